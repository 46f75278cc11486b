"""Runs a scenario as Kubernetes would: starts the driver again after every exit that is worth a retry, and watches.

The supervising process becomes the reaper of all orphans, so whatever a run leaves behind is found below it, also what
has changed its session, its parent or its environment; as root it also has a /dev/shm of its own. Hence one process
supervises one run at a time.
"""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.plan import Kill, Scenario
from tests.chaos.reward import SLOW

ROOT = Path(__file__).parents[2]
FATAL = {1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15}
"""Exit codes after which nothing is started again; 1 is a bug."""
START_SECONDS = 900.0
"""A start that takes longer hangs."""
GONE_SECONDS = 10.0
SHM = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER, CLONE_NEWNS, MS_PRIVATE = 36, 0x20000, 0x44000  # of <linux/prctl.h>, sched.h, mount.h


@dataclass(frozen=True)
class Start:
    began: float
    ended: float
    code: int | None
    """Of the driver; negative: a signal; None: it hung and was killed."""
    left: tuple[str, ...]
    """Processes that were still there GONE_SECONDS after its end."""


@dataclass
class Seen:
    """What was observed of a run. Times are those of time.time()."""

    scenario: Scenario
    run_dir: Path
    starts: list[Start] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    """Of stdout, as they came."""
    published: list[tuple[float, dict[str, list[int]]]] = field(default_factory=list)
    """Every change of pids.json."""
    struck: dict[Kill, float] = field(default_factory=dict)
    missed: list[Kill] = field(default_factory=list)
    """Kills that never happened, or found nobody."""
    shm: tuple[str, ...] = ()
    errors: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.starts) and self.starts[-1].code == 0


def stand_alone() -> None:
    """Orphans below this process become its children; what it starts shares no memory with the rest of the machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if libc.unshare(CLONE_NEWNS) == 0:  # only root may
        libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_PRIVATE), None)
        libc.mount(b"tmpfs", bytes(SHM), b"tmpfs", ctypes.c_ulong(0), None)


@contextlib.contextmanager
def fresh(seen: Seen, folder: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """An empty folder for a scenario: the environment of its drivers and their folder of faults. Nothing survives."""
    faults = folder / seen.scenario.name / "faults"
    shutil.rmtree(faults.parent, ignore_errors=True)
    faults.mkdir(parents=True)
    temporary = tempfile.mkdtemp(prefix="chaos-")  # short: Ray's sockets are below it
    before = set(os.listdir(SHM))
    try:
        yield {"GRPO_FAULT_DIR": str(faults), "TMPDIR": temporary}, faults
    finally:
        kill_all()
        shutil.rmtree(temporary, ignore_errors=True)
        seen.shm = left_in_shm(before)


def run(scenario: Scenario, folder: Path, command: Sequence[str], starts: int) -> Seen:
    """Runs `command` with the scenario's overrides, up to `starts` times, in `folder`/<name>."""
    seen = Seen(scenario, folder / scenario.name / "run")
    fixed = "cluster.colocate=true" in command  # then there are as many engines as ranks
    own = [each for each in scenario.overrides if not (fixed and each.startswith("rollout.engines="))]
    overrides = [f"run.dir={seen.run_dir}", f"run.seed={scenario.seed}", *own]
    with fresh(seen, folder) as (environment, faults):
        while len(seen.starts) < starts:
            start(
                seen,
                [*command, *overrides],
                environment | {"GRPO_FAULTS": scenario.faults, SLOW: scenario.slow},
                faults,
            )
            if seen.starts[-1].code in {0, None, *FATAL}:
                break
    look_back(seen, faults)
    return seen


def look_back(seen: Seen, faults: Path) -> None:
    """Which of the scenario's kills happened, and when."""
    for kill in seen.scenario.kills:
        file = faults / kill.struck
        if file.exists() and (text := file.read_text()):
            seen.struck[kill] = float(text)
        else:
            seen.missed.append(kill)


def kill_all() -> None:
    for process in below():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def start(seen: Seen, command: Sequence[str], environment: Mapping[str, str], faults: Path) -> None:
    """One start of the driver, to its end and that of all its processes."""
    began = time.time()
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with open(faults.parent / "stderr.txt", "a+", encoding="utf-8") as errors:
        driver = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        )
        reader = threading.Thread(target=read, args=(driver, seen))
        reader.start()
        code = watch(driver, seen, faults, began + START_SECONDS)
        ended = time.time()
        left = tuple(process.name() for process in gone_within(GONE_SECONDS))
        kill_all()  # so that the next start is not disturbed, and the pipe is closed
        reader.join()
        seen.errors = (faults.parent / "stderr.txt").read_text(encoding="utf-8")[-3000:]
    seen.starts.append(Start(began, ended, code, left))
    with open(faults.parent / "stdout.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{when:.3f} {line}\n" for when, line in seen.lines)


def read(driver: subprocess.Popen[bytes], seen: Seen) -> None:
    assert driver.stdout
    with driver.stdout:
        for line in driver.stdout:
            seen.lines.append((time.time(), line.decode(errors="replace").rstrip()))


def watch(driver: subprocess.Popen[bytes], seen: Seen, faults: Path, deadline: float) -> int | None:
    """Waits for the driver, reaps orphans, and notes every change of who plays a role. None if it hangs."""
    round_number = 0
    while driver.poll() is None:
        note(seen, faults / "pids.json")
        round_number += 1
        if round_number % 10 == 0:
            reap(driver.pid)
        if time.time() > deadline:
            show_stacks(driver.pid, faults.parent / "hang.txt")
            driver.kill()
            driver.wait()
            return None
        time.sleep(0.03)
    note(seen, faults / "pids.json")
    return driver.returncode


def note(seen: Seen, path: Path) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    if not seen.published or known != seen.published[-1][1]:
        seen.published.append((time.time(), known))


def show_stacks(pid: int, file: Path) -> None:
    spy = Path(sys.executable).with_name("py-spy")
    with open(file, "w", encoding="utf-8") as out, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([spy, "dump", "--pid", str(pid)], stdout=out, stderr=out, timeout=20)


def below() -> list[psutil.Process]:
    """Living processes below this one."""
    found = psutil.Process().children(recursive=True)
    living = []
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and not is_ours(process):
                living.append(process)
    return living


def is_ours(process: psutil.Process) -> bool:
    """multiprocessing's own helper."""
    return "multiprocessing" in " ".join(process.cmdline())


def reap(driver: int) -> None:
    """Zombies that this process has inherited; as an init process would."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid != driver and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def gone_within(seconds: float) -> list[psutil.Process]:
    """Processes below this one that are still there after that time."""
    deadline = time.monotonic() + seconds
    while (left := below()) and time.monotonic() < deadline:
        time.sleep(0.1)
        reap(0)
    return left


def left_in_shm(before: set[str]) -> tuple[str, ...]:
    """New files in shared memory that no process of this machine uses."""
    new = {str(SHM / name) for name in set(os.listdir(SHM)) - before}
    for process in psutil.process_iter() if new else ():
        with contextlib.suppress(psutil.Error, OSError):
            new -= {part.path for part in process.memory_maps()}
    return tuple(sorted(name for name in new if os.path.exists(name)))
