"""What a tree of processes holds, looked up in /proc from outside: tasks, memory, files; and the end of all that."""

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from grpo.rewards.sandbox import limits

END_SECONDS = 5.0
SCRATCH_BYTES, SCRATCH_FILES, SCRATCH_DEPTH = 512 << 20, 2_048, 100
CHANNELS = 128
"""Sockets, pipes and the like, whose buffers no limit of memory counts: some 200 KB each, by the system's defaults."""
LOCKS, MAPPINGS = 1_024, 1 << 18
LONGEST_FDINFO = 65_536


class Excess(Exception):
    """More than is allowed. `kind` is one of those of failed calls."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


MOST_ATTEMPTS = 100
"""Of a walk up from a process whose ancestors keep ending."""


def process_tree(pid: int, spared: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """A process that reaps its orphans, and all below it, each with its number of threads. They may change meanwhile.

    Looks no further than at twice as many as are allowed, and not at the spared and what is below those.
    """
    found, threads = [pid], 0
    for member in found:
        with suppress(OSError):
            tasks = os.listdir(f"/proc/{member}/task")
            yield member, len(tasks)
            threads += len(tasks)
            for task in tasks if threads < 2 * limits.TASKS else ():
                with suppress(OSError), open(f"/proc/{member}/task/{task}/children") as file:  # it may have ended
                    found += [child for child in map(int, file.read().split()) if child not in spared]


def is_below(pid: int, reaper: int) -> bool:
    """Whether a process has this one, which reaps its orphans, above it. Raises ProcessLookupError if there is none.

    Asked from below, as a list of children may lack living ones while others of it end.
    """
    member, attempts = pid, 0
    while member > 1 and member != reaper:
        try:
            with open(f"/proc/{member}/stat", "rb") as file:
                member = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            if member == pid:
                raise ProcessLookupError(pid) from None
            member, attempts = pid, attempts + 1  # one between has ended: one nearer to the reaper has its children
            if attempts > MOST_ATTEMPTS:  # or it cannot be seen, as it is another user's: then all this is not below
                return False
        except PermissionError:
            return False
    return member == reaper and pid != reaper


def views(pids: Iterable[int]) -> list[str]:
    """For each living process the folder in /proc that shows it.

    It is that of a living thread: where the first has ended, the process's own folder shows neither memory nor files.
    """
    found = []
    for pid in pids:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError), open(f"/proc/{pid}/task/{task}/statm") as file:
                    if not file.read().startswith("0 "):
                        found.append(f"/proc/{pid}/task/{task}")
                        break
    return found


def look_at_memory(shown: Iterable[str], most: int) -> None:
    """Raises Excess; what processes share is counted in parts, which takes longer to find out."""
    shown = list(shown)
    if sum(_sum(f"{view}/status", ("VmRSS:", "VmSwap:", "VmPTE:")) for view in shown) <= most:
        return
    used = sum(_sum(f"{view}/smaps_rollup", ("Pss:", "SwapPss:")) for view in shown)
    used += sum(_sum(f"{view}/status", ("VmPTE:",)) for view in shown)
    if used > most:
        raise Excess("memory", f"used {used >> 20} MiB of memory with its processes")


def _sum(path: str, names: tuple[str, ...]) -> int:
    try:
        with open(path) as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(names))
    except PermissionError:
        raise Excess("processes", "started a process that cannot be looked at") from None
    except OSError:  # it has ended
        return 0


@dataclass
class Held:
    """What the open files of a tree come to; each file once, however many hold it."""

    unlinked: dict[int, int] = field(default_factory=dict)
    """Bytes by inode of files without a name."""
    channels: set[object] = field(default_factory=set)
    locks: int = 0
    mappings: int = 0

    def look(self, shown: Iterable[str], scratch: str, at_mappings: bool) -> None:
        """Raises Excess."""
        for view in shown:
            self._files(view)
            if at_mappings:
                self._mapped(view, scratch)
        if len(self.channels) > CHANNELS:
            raise Excess("memory", f"opened more than {CHANNELS} sockets and pipes, whose memory nothing else limits")
        if self.locks > LOCKS or self.mappings > MAPPINGS:
            raise Excess("memory", f"took {self.locks} locks and {self.mappings} mappings")
        look_at_disk(scratch, sum(self.unlinked.values()))

    def _files(self, view: str) -> None:
        try:
            numbers = os.listdir(f"{view}/fd")
        except PermissionError:
            raise Excess("processes", "started a process that cannot be looked at") from None
        except OSError:
            return
        for number in numbers:
            with suppress(OSError):
                found = os.stat(f"{view}/fd/{number}")
                regular = stat.S_ISREG(found.st_mode)
                if regular and not found.st_nlink:
                    self.unlinked[found.st_ino] = found.st_blocks * 512
                if regular or stat.S_ISSOCK(found.st_mode):
                    self._details(f"{view}/fdinfo/{number}")
                if not regular and not stat.S_ISDIR(found.st_mode) and not stat.S_ISCHR(found.st_mode):
                    self.channels.add(found.st_ino if stat.S_IFMT(found.st_mode) else f"{view}/{number}")

    def _details(self, path: str) -> None:
        with open(path) as file:
            text = file.read(LONGEST_FDINFO)
        self.locks += text.count("lock:")
        if "scm_fds:" in text and int(text.partition("scm_fds:")[2].split()[0]):
            raise Excess("disk", "hid open files in a socket")

    def _mapped(self, view: str, scratch: str) -> None:
        with suppress(OSError), open(f"{view}/maps") as file:
            for line in file:
                self.mappings += 1
                if self.mappings > MAPPINGS:
                    return
                if line.endswith(" (deleted)\n") and f" {scratch}/" in line:
                    self.unlinked.setdefault(int(line.split()[4]), limits.FILE_BYTES)  # how large it is, is not shown


def look_at_disk(folder: str, unlinked: int) -> None:
    """Raises Excess for a scratch folder, which may change meanwhile."""
    files, size = 0, unlinked
    folders = [(folder, 0)]
    while folders:
        place, depth = folders.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    files, size = files + 1, size + entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > SCRATCH_FILES or depth > SCRATCH_DEPTH or size > SCRATCH_BYTES:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, depth + 1))
        except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
            continue
        except OSError:  # without the right to, or with a longer path than there may be
            raise Excess("disk", "made a folder that cannot be listed") from None
        if files > SCRATCH_FILES or depth > SCRATCH_DEPTH:
            break
    if files > SCRATCH_FILES or depth > SCRATCH_DEPTH or size > SCRATCH_BYTES:
        raise Excess("disk", f"made {files} files of {size >> 20} MiB, {depth} folders deep")


def end_all(group: int) -> None:
    """Kills a group, which its members cannot leave, and whatever else is below this subreaper."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for other in [member for member, _ in process_tree(os.getpid())][1:]:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def empty(folder: str, kept: Collection[str]) -> bool:
    """Removes all but the kept from a folder in which somebody may be at work; whether that went well."""
    with suppress(OSError, RecursionError):
        for name in set(os.listdir(folder)) - set(kept):
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)  # follows no links
            else:
                os.unlink(path)
        return set(os.listdir(folder)) <= set(kept)
    return False


def remove(folder: str) -> bool:
    """Removes a folder, however deep and odd, in which nobody is at work any more; whether it is gone."""
    with suppress(OSError, RecursionError):
        shutil.rmtree(folder)
    if os.path.lexists(folder):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], check=False, stderr=subprocess.DEVNULL)
    return not os.path.lexists(folder)
