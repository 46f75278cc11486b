"""What the lanes of a run did when: timeline.jsonl and, for Perfetto and Chrome, trace.json.

A row: {"event": "span", "step": 3, "lane": "rollout", "what": "sample", "track": 0, "start": 1790000000.1, "end": …},
in unix seconds. Spans of one lane that overlap have different tracks. The file is bounded: of a long run it keeps
stretches of steps, evenly from the start to the end, and the newest ones.
"""

import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from grpo.observe.folder import MOST_SAMPLES, appended, commit_file, line_of, writing
from grpo.observe.lanes import BUSY, Span
from grpo.observe.rows import step_of
from grpo.run.layout import TIMELINE, TRACE
from grpo.store.files import read_regular

MOST_BYTES = 8 << 20
STRETCH = 16
"""Steps that are kept or taken out together."""
LANES = list(BUSY)


class Timeline:
    """Writes spans, from any thread. Raises CheckpointError if it cannot; after `close` nothing is written.

    `ahead` is how many batches after a checkpoint's step it holds: their spans outlive going back to it.
    """

    def __init__(self, run_dir: Path, ahead: int, trace: bool) -> None:
        self._run_dir, self._ahead, self._wants_trace = run_dir, ahead, trace
        self._guard = threading.Lock()
        self._stack = ExitStack()
        with writing(run_dir):
            self._rewrite(self._lines())

    def add(self, span: Span) -> None:
        """One more row."""
        times = {"start": round(span.start, 4), "end": round(span.end, 4)}
        row = {"event": "span", "step": span.step, "lane": span.lane, "what": span.what, "track": span.track, **times}
        with self._guard, writing(self._run_dir):
            if self._file.closed:
                return
            line = line_of(row)
            self._file.write(line)
            self._size += len(line)
            if self._wants_trace:
                self._trace.write(self._event(line.encode()))
            if self._size > MOST_BYTES:
                self._rewrite(thinned(self._lines(), MOST_BYTES // 2))

    def rewind(self, step: int) -> None:
        """Takes out the spans of steps that will be made again."""
        with self._guard, writing(self._run_dir):
            self._rewrite([line for line in self._lines() if self._outlives(line, step)])

    def close(self) -> None:
        """Raises CheckpointError for a disk that is full only now."""
        with self._guard, writing(self._run_dir):
            self._stack.close()

    def _outlives(self, line: bytes, step: int) -> bool:
        if step_of(line) <= step:
            return True
        drawn = step > 0 and step_of(line) <= step + self._ahead
        return drawn and json.loads(line).get("lane") == "rollout"

    def _lines(self) -> list[bytes]:
        try:
            return read_regular(self._run_dir / TIMELINE, MOST_SAMPLES).splitlines(True)
        except FileNotFoundError:
            return []

    def _rewrite(self, lines: list[bytes]) -> None:
        """New files with these lines, so that an older start cannot write into them."""
        whole = [line for line in lines if line.endswith(b"\n")]
        self._size = sum(map(len, whole))
        self._named: set[int] = set()
        self._stack.close()
        with ExitStack() as stack:
            commit_file(self._run_dir / TIMELINE, b"".join(whole))
            self._file = stack.enter_context(appended(self._run_dir / TIMELINE))
            if self._wants_trace:
                commit_file(self._run_dir / TRACE, ("[\n" + "".join(map(self._event, whole))).encode())
                self._trace = stack.enter_context(appended(self._run_dir / TRACE))
            self._stack = stack.pop_all()

    def _event(self, line: bytes) -> str:
        """A row in the words of Chrome's trace format, whose array need not be closed: "" for a row of no span.

        https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        try:
            row = json.loads(line)
            thread = 100 * LANES.index(row["lane"]) + int(row["track"])
            start, end = round(row["start"] * 1e6), round(row["end"] * 1e6)
            step, what = int(row["step"]), str(row["what"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return ""
        place = {"pid": 1, "tid": thread}
        events: list[dict[str, object]] = []
        if thread not in self._named:
            self._named.add(thread)
            name = row["lane"] + (f" {row['track'] + 1}" if row["track"] else "")
            events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
            events.append({"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": thread}})
        called = {"ph": "X", "name": f"{what} {step}", "cat": what}
        events.append({**called, **place, "ts": start, "dur": max(end - start, 0), "args": {"step": step}})
        return "".join(json.dumps(event) + ",\n" for event in events)


def thinned(lines: list[bytes], most: int) -> list[bytes]:
    """At most so many bytes of the lines: every second, fourth, … stretch of steps, and the newest ones."""
    kept = [(step // STRETCH, line) for line in lines if (step := step_of(line)) < sys.maxsize]
    newest, every = max((stretch for stretch, _ in kept), default=0), 1
    while sum(len(line) for _, line in kept) > most and every <= newest:
        every *= 2
        kept = [(stretch, line) for stretch, line in kept if stretch % every == 0 or stretch >= newest - 1]
    left = [line for _, line in kept]
    size = sum(map(len, left))
    while size > most:  # a single stretch is as long as that
        size -= len(left.pop(0))
    return left
