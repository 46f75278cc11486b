"""`grpo k8s logs`: the driver's lines from the head's pod, over lost connections and new attempts."""

import contextlib
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from grpo.config.text import clean
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError
from grpo.kubernetes.release import HEAD_CONTAINER, Pod, Release
from grpo.kubernetes.tools import failure
from grpo.run.layout import LOGS

LOOK_SECONDS = 3.0
"""Between two looks at the RayJob."""
MOST_SECONDS = 120.0
"""For a whole log."""
SILENT_SECONDS = 300.0
"""Of a log, which is then opened again: the connection may be gone without a sign."""
PAUSE_SECONDS = 1.0
QUIET_SECONDS = 0.5
END_SECONDS = 5.0
BLOCK = 1 << 16
BANNER = "Process exit logs will be saved to"
"""In the last line of what `ray start` prints before the driver says anything."""
LONGEST_BANNER = 200
SECONDS, NANOSECONDS = 19, 29
"""Where seconds and nanoseconds end in a time as `stamped` writes it; behind them is the zone."""

Say = Callable[[str], None]


def driver_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines behind Ray's banner; all of them where it does not come."""
    held: list[str] | None = []
    for line in lines:
        if held is None:
            yield line
        elif BANNER in line:
            held = None
        else:
            held.append(line)
            if len(held) > LONGEST_BANNER:
                yield from held
                held = None
    yield from held or []


def head_log(release: Release, head: Pod, *options: str) -> list[str]:
    """Lines of the head's log as they are now."""
    text = release.cluster.kubectl("logs", head.name, "-c", HEAD_CONTAINER, *options, seconds=MOST_SECONDS)
    return [shown(line) for line in lines_in(text)]


def lines_in(text: str) -> list[str]:
    """As kubelets count them: a line that rewrites itself (a bar of progress) is one."""
    return text.removesuffix("\n").split("\n") if text else []


def shown(line: str) -> str:
    """A line as it can stand on a terminal; of one that rewrites itself what is there in the end."""
    return clean(line.rstrip("\r").rpartition("\r")[2])


def show(release: Release, say: Say) -> None:
    """Says all that the driver has said. Raises ClusterError or ConfigError where there is no log to read."""
    head = release.head()
    if head is None or not head.started:
        raise no_log(release, head)
    for line in driver_lines(head_log(release, head, "--tail=-1")):
        say(line)


def no_log(release: Release, head: Pod | None) -> ClusterError | ConfigError:
    """Why there is no log: the run has not started, is stopped, or is over."""
    rule = f"the log is that of the head's pod, but {release}"
    if release.debugged and not release.over:
        return ConfigError(f"{rule}, and job.debug is true, so no run starts there; helm upgrade without it")
    if release.over:
        last = f", and the last it said: {release.short_message}" if release.message else ""
        return ConfigError(
            f"{rule}, so its pods are gone{last}; its lines are in {LOGS}/ of the run's folder, on the claim of runs"
        )
    if release.suspended:
        return ConfigError(f"{rule}, so it has no pods; `grpo k8s status` says how it goes on")
    found = f"its head is {head.state}" if head else "it has no head yet"
    return ClusterError(f"{rule}, and {found}; try again, wait with -f, or ask `grpo k8s status`")


def follow(release: Release, say: Say, seconds: float) -> None:
    """Says the driver's lines until the run is over, also those of later attempts.

    Raises ClusterError for a run that failed, DeadlineExceeded if for so long there is no head, or no answer.
    """
    seen, waiting, since = Seen(""), "", None
    while True:
        before, found = seen.stamp, ""
        try:
            release = release.again()
            head = release.head()
            if release.over:
                break
            if release.suspended or release.debugged:
                raise no_log(release, head)
            if head and head.started:
                seen = seen if seen.pod == head.name else Seen(head.name)
                _stream(release, head, seen, say)
                since = None
                time.sleep(PAUSE_SECONDS)  # a log that ends at once is not hammered at
                continue
            problem: GrpoError = no_log(release, head)
            found = head.state if head else "no pod yet"
        except ClusterError as error:  # a cluster that does not answer for a moment ends nothing
            problem = error
        now = time.monotonic()
        since = now if since is None or seen.stamp != before else since
        if now - since > seconds:
            raise DeadlineExceeded(f"{problem} (waited --wait {seconds:g} s)")
        if found and found != waiting:
            say(f"waiting for the head: {found}")
            waiting = found
        time.sleep(LOOK_SECONDS)
    if head and head.started:
        _rest(release, head, seen, say)
    conclude(release)


def conclude(release: Release) -> None:
    """Returns for a run that has succeeded. Raises ClusterError for any other."""
    if not release.succeeded:
        raise ClusterError(
            f"{release} (it must be SUCCEEDED): {release.short_message or 'KubeRay says no more'}; mend the cause, "
            "then helm upgrade, with another job.restart where the values stay the same"
        )


class Seen:
    """What of a pod's log was said: up to the time `stamp`, and how many lines of that very time.

    So no line comes twice or is lost where the log is opened again.
    """

    def __init__(self, pod: str) -> None:
        self.pod = pod
        self.stamp = ""
        self._count = 0
        self._until, self._skip = "", 0
        self._held: list[str] | None = []

    def take(self, raw: str) -> list[str]:
        """The driver's lines that one more line of `kubectl logs --timestamps` brings."""
        stamp, line = stamped(raw)
        if self._until and stamp:
            if stamp < self._until or (stamp == self._until and self._skip):
                self._skip -= stamp == self._until
                return []
            self._until = ""
        self._count = self._count + 1 if stamp in ("", self.stamp) else 1
        self.stamp = stamp or self.stamp
        if self._held is None:
            return [line]
        self._held.append(line)
        if BANNER not in line and len(self._held) <= LONGEST_BANNER:
            return []
        held, self._held = self._held, None
        return list(driver_lines(held))

    def rest(self) -> list[str]:
        """What was held back for the sake of a banner that has not come."""
        held, self._held = self._held or [], None
        return held

    def options(self) -> list[str]:
        """Of `kubectl logs` that is about to be opened; in whole seconds, as kubelets count."""
        self._until, self._skip = self.stamp, self._count
        second = self.stamp[:SECONDS] + self.stamp[NANOSECONDS:]
        return ["--timestamps", f"--since-time={second}" if second else "--tail=-1"]


def stamped(raw: str) -> tuple[str, str]:
    """The time of a line, of a length that compares, and its text; "" and all of it where there is no time."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)(?: (.*))?", raw, re.DOTALL)
    if match is None:
        return "", shown(raw)
    return f"{match[1]}.{(match[2] or '').ljust(9, '0')}{match[3]}", shown(match[4] or "")


def _stream(release: Release, head: Pod, seen: Seen, say: Say) -> None:
    """Says what comes until kubectl ends, the pod is another one, or the run is over. Raises what kubectl's end is."""
    command = release.cluster.command("kubectl", "logs", head.name, "-c", HEAD_CONTAINER, "-f", *seen.options())
    with tempfile.TemporaryFile() as errors, opened(command, errors) as child:
        looked = heard = time.monotonic()
        for raw in lines_of(child):
            if raw is not None:
                heard = time.monotonic()
                for line in seen.take(raw):
                    say(line)
            if raw is None and time.monotonic() > looked + LOOK_SECONDS:  # quiet, so nothing is cut off
                looked = time.monotonic()
                if _moved_on(release, head) or looked > heard + SILENT_SECONDS:
                    return
        code = child.wait(END_SECONDS)
        errors.seek(0)
        if code:
            raise failure(command, errors.read().decode(errors="replace"), code)


def _moved_on(release: Release, head: Pod) -> bool:
    with contextlib.suppress(ClusterError):  # the log goes on while the API has its moments
        now = release.again()
        new = now.head()
        return now.over or now.suspended or (new is not None and new.name != head.name)
    return False


def _rest(release: Release, head: Pod, seen: Seen, say: Say) -> None:
    """What was not said yet of a run that is over."""
    seen = seen if seen.pod == head.name else Seen(head.name)
    with contextlib.suppress(ClusterError):  # the pod has just gone
        text = release.cluster.kubectl("logs", head.name, "-c", HEAD_CONTAINER, *seen.options(), seconds=MOST_SECONDS)
        for raw in lines_in(text):
            for line in seen.take(raw):
                say(line)
    for line in seen.rest():
        say(line)


@contextlib.contextmanager
def opened(
    command: list[str], errors: IO[bytes] | int, given: int = subprocess.DEVNULL
) -> Iterator["subprocess.Popen[bytes]"]:
    """A program whose output is read as it comes; it is ended in the end, and Ctrl-C is ours to hear."""
    with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=errors, start_new_session=True) as child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def lines_of(child: "subprocess.Popen[bytes]") -> Iterator[str | None]:
    """Lines as they come until the program ends; None whenever nothing has come for a moment."""
    assert child.stdout is not None
    pipe, left = child.stdout.fileno(), b""
    while True:
        if not select.select([pipe], [], [], QUIET_SECONDS)[0]:
            yield None
            continue
        block = os.read(pipe, BLOCK)
        if not block:
            break
        *whole, left = (left + block).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if left:
        yield left.decode(errors="replace")
