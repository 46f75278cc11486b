"""Starts one worker, watches what the kernel does not limit, and leaves nothing behind. It runs no user code.

stdin: one line of settings; its end means that the run is over or dead. stdout: {"pid": worker}, and when the worker is
gone {"ended": "exited", "what": "ended the reward process (exit code 7)"}. stderr: a bounded part of what user code
prints. The worker's own pipes come as `settings["requests"]` and `settings["replies"]`.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from grpo.rewards.sandbox import limits, seccomp, worker

LOOK_SECONDS = 0.05
END_SECONDS = 5.0
SCRATCH_BYTES, SCRATCH_FILES, SCRATCH_DEPTH = 1 << 30, 2_048, 100
OUTPUT_BYTES, OUTPUT_SECONDS = 65_536, 60.0
TOO_MANY = {"ended": "processes", "what": f"started more than {limits.TASKS} processes and threads"}
CONTROL = bytes(code for code in range(32) if code not in b"\t\n") + b"\x7f"


def main() -> None:
    """From the line of settings to the worker's end, of which it tells; then nothing of it is left."""
    settings: worker.Settings = json.loads(sys.stdin.buffer.readline())
    ctypes.CDLL(None).prctl(worker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    output, output_end = os.pipe()
    uid = own_user(settings)
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        become_worker(settings, uid, output_end, there)
    there.close()
    for fd in (output_end, settings["requests"], settings["replies"]):
        os.close(fd)
    say({"pid": pid})
    listeners = socket.recv_fds(here, 1, 1)[1]  # none if the kernel has no such thing, or the worker has died
    ended = Watch(pid, output, settings, listeners).until_the_end()
    end_all(pid)
    remove(settings["scratch"])
    with suppress(BrokenPipeError):
        say(ended)


def say(message: Mapping[str, object]) -> None:
    """Writes one line of JSON to the caller."""
    os.write(1, json.dumps(message).encode() + b"\n")


def own_user(settings: worker.Settings) -> int | None:
    """The user that the worker becomes, or None if it must stay the one of the run."""
    uid, scratch = settings["uid"], settings["scratch"]
    path = [os.getcwd(), *settings["path"]]
    if uid is None or os.geteuid() != 0:
        return None
    modules = [name.partition(":")[0] for name in settings["functions"]]
    with suppress(PermissionError):  # root of a container may have no capabilities
        os.chown(scratch, uid, uid)
        if limits.can_become(uid, limits.needed_paths(modules, path), scratch):
            return uid
        os.chown(scratch, 0, 0)
    return None


def become_worker(settings: worker.Settings, uid: int | None, output_end: int, supervisor: socket.socket) -> None:
    """What the fork does: closes all that is not the worker's, runs it, and never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output_end, 1)
        os.dup2(output_end, 2)
        kept = {0, 1, 2, settings["requests"], settings["replies"], supervisor.fileno()}
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd not in kept:
                with suppress(OSError):
                    os.close(fd)
        worker.run(settings, uid, supervisor)
        code = 0
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{worker.describe(error)}\n".encode())
    finally:
        os._exit(code)


class Watch:
    """Waits for the end of a worker, and brings it about when the worker takes too much."""

    def __init__(self, pid: int, output: int, settings: worker.Settings, listeners: list[int]) -> None:
        self.pid = pid
        self.output = output
        self.scratch = settings["scratch"]
        self.memory_bytes = settings["memory_bytes"]
        self.listeners = listeners
        self.budget, self.window = OUTPUT_BYTES, time.monotonic()

    def until_the_end(self) -> dict[str, str]:
        """How the worker ended, or for what it must be ended; `closed` if the caller is gone."""
        poll = select.poll()
        for fd in (0, self.output, *self.listeners):
            poll.register(fd, select.POLLIN)
        looked = 0.0
        while True:
            events = dict(poll.poll(LOOK_SECONDS * 1000))
            if 0 in events:
                return {"ended": "closed", "what": "was closed"}
            if self.output in events and not self.pass_on():
                poll.unregister(self.output)
            for listener in self.listeners:
                if not events.get(listener, 0) & select.POLLIN:
                    continue
                if not self.has_room():
                    return TOO_MANY
                seccomp.allow(listener)
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status:
                return how_it_ended(status)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if excess := self.excess():
                    return excess

    def has_room(self) -> bool:
        """Whether there may be one more process or thread."""
        return sum(threads for _, threads in process_tree(self.pid)) < limits.TASKS

    def pass_on(self) -> bool:
        """Drains the output, but lets only so much a minute through. False at its end."""
        data = os.read(self.output, OUTPUT_BYTES)
        if time.monotonic() - self.window > OUTPUT_SECONDS:
            self.budget, self.window = OUTPUT_BYTES, time.monotonic()
        if self.budget > 0:
            with suppress(OSError):
                os.write(2, data[: self.budget].translate(None, CONTROL))
                if len(data) > self.budget:
                    os.write(2, b"\n[reward code prints too much: the rest of this minute is left out]\n")
        self.budget -= len(data)
        return bool(data)

    def excess(self) -> dict[str, str] | None:
        """What the worker and its children have too much of."""
        tasks = dict(process_tree(self.pid))
        if sum(tasks.values()) > limits.TASKS:
            return TOO_MANY
        most = self.memory_bytes
        if sum(map(resident_bytes, tasks)) > most and (used := sum(map(own_bytes, tasks))) > most:
            return {"ended": "memory", "what": f"used {used >> 20} MiB of memory with its processes"}
        return disk_excess(self.scratch)


def how_it_ended(status: os.waitid_result) -> dict[str, str]:
    """The last message about a worker that ended by itself, or by its limit of CPU time."""
    if status.si_code == os.CLD_EXITED:
        return {"ended": "exited", "what": f"ended the reward process (exit code {status.si_status})"}
    name = signal.Signals(status.si_status).name
    if name == "SIGXCPU":
        return {"ended": "timeout", "what": "used up its CPU time"}
    return {"ended": "exited", "what": f"ended the reward process ({name})"}


def process_tree(pid: int) -> Iterator[tuple[int, int]]:
    """A process, which reaps its orphans, and all below it, each with its number of threads. They may change meanwhile.

    Looks no further than at twice as many as are allowed.
    """
    found, threads = [pid], 0
    for member in found:
        with suppress(OSError):
            tasks = os.listdir(f"/proc/{member}/task")
            yield member, len(tasks)
            threads += len(tasks)
            for task in tasks if threads < 2 * limits.TASKS else ():
                with open(f"/proc/{member}/task/{task}/children") as file:
                    found += map(int, file.read().split())


def resident_bytes(pid: int) -> int:
    """Memory of a process; what it shares with others is counted in each."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def own_bytes(pid: int) -> int:
    """Memory of a process with its part of what it shares; takes longer to find out."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except OSError:  # gone, or another user's
        return resident_bytes(pid)


def disk_excess(folder: str) -> dict[str, str] | None:
    """What a scratch folder has too much of; it may change while this looks."""
    files = size = 0
    folders = [(folder, 0)]
    while folders:
        place, depth = folders.pop()
        with suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                files, size = files + 1, size + entry.stat(follow_symlinks=False).st_blocks * 512
                if files > SCRATCH_FILES or size > SCRATCH_BYTES or depth > SCRATCH_DEPTH:
                    return {"ended": "disk", "what": f"made {files} files of {size >> 20} MiB, {depth} folders deep"}
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, depth + 1))
    return None


def end_all(pid: int) -> None:
    """Kills the worker's group, which its children cannot leave, and whatever else has come to this subreaper."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for other in [member for member, _ in process_tree(os.getpid())][1:]:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def remove(folder: str) -> None:
    """Removes a folder, however deep and odd user code has made it."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)
