"""A process beside each engine (and a local Ray) that ends what it leaves behind, in whatever state that is.

An engine core that is frozen cannot watch anything itself, so this is a process of its own, a child of nobody, with
nothing but the standard library: `python -I -S watchdog.py PARENT CORE FOLDER`. When the process that started the
engine (PARENT) or the engine core (CORE) is gone, it kills the core and all its descendants, stopped ones too, removes
their shared memory and FOLDER (the engine's sockets), and ends.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
from pathlib import Path

FIRST_LOOK, RAREST_LOOK = 0.25, 10.0  # seconds between two looks at what the engine has started by now
SHARED = "/dev/shm/"


class WatchedProcesses:
    """The processes of one engine, held by descriptors (a pid may be another process's by now), and their memory."""

    def __init__(self, core: int, not_ours: set[str]) -> None:
        self.core = core
        self.held = {core: os.pidfd_open(core)}
        self.not_ours = not_ours
        self.shared: set[str] = set()

    def look(self) -> None:
        """Takes note of new descendants and of the shared memory that the processes use."""
        for pid in [pid for pid, held in self.held.items() if pid != self.core and has_ended(held)]:
            os.close(self.held.pop(pid))  # an engine that starts many for a moment must not use up our descriptors
        before = 0
        while len(self.held) > before:
            before = len(self.held)
            living = {pid for pid, descriptor in self.held.items() if not has_ended(descriptor)}
            for pid, parent in processes():
                if parent in living and pid not in self.held and pid != os.getpid():
                    with contextlib.suppress(OSError):
                        self.held[pid] = os.pidfd_open(pid)
        for pid in self.held:
            self.shared |= shared_memory(pid) - self.not_ours

    def try_to_look(self) -> None:
        """`look`, which must not end the watchdog: no memory, no descriptors, a process that goes meanwhile."""
        with contextlib.suppress(Exception):
            self.look()

    def end(self) -> None:
        """Kills all of them and removes the shared memory they had."""
        self.try_to_look()
        for _ in range(2):  # one that was being started escapes the first time
            for descriptor in self.held.values():
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            self.try_to_look()
        for path in self.shared:
            with contextlib.suppress(OSError):
                os.unlink(path)


def start_watchdog(parent: int, folder: str, core: int | None = None) -> None:
    """Starts a watchdog of `core`, by default this process, in a session of its own, with nothing of ours open or set.

    Raises: CalledProcessError if it cannot watch.
    """
    import subprocess  # not for the watchdog itself

    subprocess.run(
        [sys.executable, "-I", "-S", __file__, str(parent), str(core or os.getpid()), folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={},
        check=True,
    )


def has_ended(descriptor: int) -> bool:
    """Whether the process behind a pidfd is gone."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def processes() -> list[tuple[int, int]]:
    """Every process of this machine and its parent."""
    return [(int(name), parent_of(int(name))) for name in os.listdir("/proc") if name.isdigit()]


def parent_of(pid: int) -> int:
    """0 for a process that is gone. Raises OSError if only the look at it failed."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def was_left(core: int, parent: int) -> bool:
    """Whether a process that died before it could be held has left the core to another one."""
    try:
        return parent_of(core) != parent
    except OSError:  # no descriptor is free: nothing is known, and nothing is killed for it
        return False


def shared_memory(pid: int) -> set[str]:
    """Files of shared memory that a process maps and that still have a name."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    paths = {line[line.index(SHARED) :] for line in lines if SHARED in line}
    return {path for path in paths if not path.endswith(" (deleted)")}


def main(parent: int, core: int, folder: str) -> None:
    """Waits for the end of `parent` or of its engine core, ends what is left of the engine and removes the folder."""
    engine = WatchedProcesses(core, not_ours=shared_memory(parent))
    poll = select.poll()
    poll.register(engine.held[core], select.POLLIN)
    with contextlib.suppress(ProcessLookupError):
        poll.register(os.pidfd_open(parent), select.POLLIN)
    if os.fork():
        os._exit(0)  # the engine core waits for this one only; the other is adopted, and no list of children holds it
    seconds = FIRST_LOOK
    while not was_left(core, parent) and not poll.poll(seconds * 1000):
        engine.try_to_look()
        seconds = min(2 * seconds, RAREST_LOOK)
    engine.end()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
