"""A worker's keeper: starts it, watches what the kernel does not limit, and leaves nothing behind. No user code here.

stdin: one line of settings, then a letter at a time: READY when the imports are done, DONE after each call; its end
means that the run is over or dead. stdout: {"pid": worker}, {"clean": true} for each letter, and when the worker is
gone {"ended": "exited", "what": "ended the reward process (exit code 7)"}. stderr: a bounded part of what user code
prints. The worker's own pipes come as `settings["requests"]` and `settings["replies"]`.
"""

import ctypes
import errno
import json
import os
import select
import signal
import socket
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress

from grpo.rewards.sandbox import limits, seccomp, usage, worker

LOOK_SECONDS = 0.05
LOOKS_AT_MAPPINGS = 4
"""Every which look is at mappings too, as they are many."""
READY, DONE = b"r", b"d"
OUTPUT_BYTES, OUTPUT_SECONDS = 65_536, 60.0
PREFIX, LONGEST_LINE, WITHOUT_TERMINAL = "[reward code] ", 4_096, 200
TOO_MANY = {"ended": "processes", "what": f"started more than {limits.TASKS} processes and threads"}


def main() -> None:
    """From the line of settings to the worker's end, of which it tells; then nothing of it is left."""
    settings: worker.Settings = json.loads(sys.stdin.buffer.readline())
    ctypes.CDLL(None).prctl(worker.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    output, output_end = os.pipe()
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        become_worker(settings, output_end, there)
    there.close()
    for fd in (output_end, settings["requests"], settings["replies"]):
        os.close(fd)
    say({"pid": pid})
    listeners = socket.recv_fds(here, 1, 1)[1]  # none if the kernel has no such thing, or the worker has died
    watch = Watch(pid, output, settings, listeners)
    ended = watch.until_the_end()
    usage.end_all(pid)
    while select.select([output], [], [], 0)[0] and watch.pass_on():
        pass
    usage.remove(settings["scratch"])
    with suppress(BrokenPipeError):
        say(ended)


def say(message: Mapping[str, object]) -> None:
    """Writes one line of JSON to the caller."""
    os.write(1, json.dumps(message).encode() + b"\n")


def become_worker(settings: worker.Settings, output_end: int, keeper: socket.socket) -> None:
    """What the fork does: closes all that is not the worker's, runs it, and never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output_end, 1)
        os.dup2(output_end, 2)
        kept = {0, 1, 2, settings["requests"], settings["replies"], keeper.fileno()}
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd not in kept:
                with suppress(OSError):
                    os.close(fd)
        worker.run(settings, keeper)
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
        self.scratch = os.path.realpath(settings["scratch"])
        self.memory_bytes = settings["memory_bytes"]
        self.listeners = listeners
        self.helpers: set[int] = set()
        self.kept: set[str] = set()
        self.looks = 0
        self.budget, self.window = OUTPUT_BYTES, time.monotonic()
        self.unfinished = b""

    def until_the_end(self) -> dict[str, str]:
        """How the worker ended, or for what it must be ended; `closed` if the caller is gone."""
        poll = select.poll()
        for fd in (0, self.output, *self.listeners):
            poll.register(fd, select.POLLIN)
        looked = 0.0
        while True:
            events = dict(poll.poll(LOOK_SECONDS * 1000))
            if 0 in events:
                letter = os.read(0, 1)
                if not letter:
                    return {"ended": "closed", "what": "was closed"}
                say({"clean": self.settle(letter)})
            if self.output in events and not self.pass_on():
                poll.unregister(self.output)
            for listener in self.listeners:
                if events.get(listener, 0) & select.POLLIN and not self.answer(listener):
                    return TOO_MANY
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status:
                return how_it_ended(status)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                try:
                    self.look()
                except usage.Excess as excess:
                    return {"ended": excess.kind, "what": str(excess)}

    def tree(self) -> dict[int, int]:
        """Threads of each process below this one, which inherits what leaves its parent."""
        tasks = dict(usage.process_tree(os.getpid(), self.helpers))
        del tasks[os.getpid()]
        return tasks

    def settle(self, letter: bytes) -> bool:
        """READY: remembers what the imports left, which stays. DONE: whether a call has left nothing else."""
        if letter == READY:
            self.helpers = set(self.tree()) - {self.pid}
            with suppress(OSError):
                self.kept = set(os.listdir(self.scratch))
            return True
        return set(self.tree()) <= {self.pid} and usage.empty(self.scratch, self.kept)

    def answer(self, listener: int) -> bool:
        """Lets signals go to processes below this one only; False if there may not be one more process or thread."""
        call = seccomp.asked(listener)
        if call is None:
            return True
        if call.signal:
            seccomp.reply(listener, call, self.refusal(call.target))
            return True
        if sum(dict(usage.process_tree(os.getpid())).values()) > limits.TASKS:  # this process is one of them
            return False
        seccomp.reply(listener, call, 0)
        return True

    def refusal(self, target: int) -> int:
        """Why a signal may not go to a process, or a negative group; as the kernel would say of one that is gone."""
        if target <= 0:
            return 0 if target in (0, -self.pid) else errno.EPERM
        try:
            return 0 if usage.is_below(target, os.getpid()) else errno.EPERM
        except ProcessLookupError:
            return errno.ESRCH

    def look(self) -> None:
        """Raises Excess for what the worker and its processes have too much of."""
        tasks = dict(usage.process_tree(os.getpid()))
        del tasks[os.getpid()]
        if sum(tasks.values()) > limits.TASKS:
            raise usage.Excess("processes", TOO_MANY["what"])
        shown = usage.views(tasks)
        usage.look_at_memory(shown, self.memory_bytes)
        usage.Held().look(shown, self.scratch, self.looks % LOOKS_AT_MAPPINGS == 0)
        self.looks += 1

    def pass_on(self) -> bool:
        """Prints what has come of the output, but only so much a minute. False at its end."""
        data = os.read(self.output, OUTPUT_BYTES)
        if time.monotonic() - self.window > OUTPUT_SECONDS:
            self.budget, self.window = OUTPUT_BYTES, time.monotonic()
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        if self.unfinished and (not data or len(self.unfinished) > LONGEST_LINE):
            lines, self.unfinished = [*lines, self.unfinished], b""
        for line in lines if self.budget > 0 else ():
            for piece in printable_lines(line[: self.budget].decode(errors="replace"), columns()):
                self.print_line(piece)
        return bool(data)

    def print_line(self, text: str) -> None:
        """To stderr, if that takes it at once: a terminal that stands still must not keep the watch from its work."""
        line = f"{PREFIX}{text}\n".encode(errors="backslashreplace")
        left = self.budget
        self.budget -= len(line)
        if left > 0 >= self.budget:
            line += f"{PREFIX}prints too much: the rest of this minute is left out\n".encode()
        if left > 0 and select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                os.write(2, line)


def columns() -> int:
    """Room for what reward code prints, so that no line of a terminal begins with it."""
    try:
        return max(20, os.get_terminal_size(2).columns - len(PREFIX) - 1)
    except OSError:
        return WITHOUT_TERMINAL


def printable_lines(text: str, most: int) -> Iterator[str]:
    """A line in pieces of so many columns, in which nothing steers a terminal or turns the direction of reading."""
    text = text.rstrip("\r").expandtabs(4)
    clean = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    piece, width = "", 0
    for char in clean:
        size = 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width + size > most:
            yield piece
            piece, width = "", 0
        piece, width = piece + char, width + size
    yield piece


def how_it_ended(status: os.waitid_result) -> dict[str, str]:
    """The last message about a worker that ended by itself."""
    if status.si_code == os.CLD_EXITED:
        return {"ended": "exited", "what": f"ended the reward process (exit code {status.si_status})"}
    name = signal.Signals(status.si_status).name
    return {"ended": "exited", "what": f"ended the reward process ({name})"}
