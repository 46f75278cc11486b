"""The other files of a run's folder beside the books: read once, from the front, a line at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.errors import CheckpointError
from grpo.observe.audit.proof import refuted, shown
from grpo.observe.chain import lines_of, short
from grpo.store.files import NotAFile, json_object

EVENTS = ("step", "eval")
EQUAL = "a line is as the books say"
NAMED = "a row of samples names the weights that made it, and its prompt"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a disk raises into CheckpointError."""
    try:
        yield
    except OSError as error:
        way_out = "take it away" if isinstance(error, NotAFile) else "check that it is there and may be read"
        raise CheckpointError(f"{path}: an audit reads it, but: {error}; {way_out}") from error


class Beside:
    """Lines of steps and evaluations in metrics.jsonl or samples.jsonl; those up to step `begun` are passed over."""

    def __init__(self, path: Path, begun: int) -> None:
        self.path, self.number = path, 0
        self._lines = self._wanted(begun)
        self._next = next(self._lines, None)

    def _wanted(self, begun: int) -> Iterator[tuple[int, str, int, bytes]]:
        with reading(self.path):
            for number, line in enumerate(lines_of(self.path), start=1):
                row = json_object(line)
                event, step = row.get("event"), row.get("step")
                if not isinstance(event, str) or type(step) is not int:
                    raise refuted(
                        f"{self.path.name}:{number}", "a line is a row", f"found {shown(line)}", "it is damaged"
                    )
                if event in EVENTS and (step > begun or begun == 0):
                    yield number, event, step, line

    def check(self, where: str, event: str, step: int, count: int, digest: str) -> list[tuple[str, bytes]]:
        """The next lines are those that the books mean; each with its place."""
        lines, places = [], []
        name = self.path.name
        for _ in range(count):
            if self._next is None:
                found = f"{where} has a line there and {name} ends before it"
                raise refuted(name, f"{name} holds what the books name", found, f"{name} was cut")
            number, found_event, found_step, line = self._next
            if (found_event, found_step) != (event, step):
                said = f"{where} says {event} {step} and line {number} is {shown(found_event)} {found_step}"
                raise refuted(
                    f"{name}:{number}", "lines come once, in order", said, "one is double, missing or exchanged"
                )
            lines.append(line)
            places.append(f"{name}:{number}")
            self.number = number
            self._next = next(self._lines, None)
        if short(b"".join(lines)) != digest:
            at = f"{name}:{self.number}" if lines else name
            raise refuted(at, EQUAL, f"{event} {step} has other bytes than {where} has sealed", "it was changed")
        return list(zip(places, lines, strict=True))

    def check_rest(self, step: int) -> int:
        """Behind the last row of the books there may be the lines of one step or evaluation; how many there are."""
        rest = 0
        while self._next is not None:
            number, event, found, _ = self._next
            if found - (event == "step") != step:
                said = f"line {number} is {event} {found} and the books end with step {step}"
                name = self.path.name
                raise refuted(f"{name}:{number}", "what the folder holds is in the books", said, "the books were cut")
            rest += 1
            self._next = next(self._lines, None)
        return rest


def digests_in(content: bytes) -> Iterator[tuple[int, str]]:
    """Step and digest of each step and evaluation among the rows that a checkpoint keeps."""
    for line in content.splitlines(keepends=True):
        row = json.loads(line)
        if row["event"] in EVENTS:
            yield row["step"], short(line)


def check_named(
    kept: Sequence[tuple[str, bytes]],
    spans: Sequence[Sequence[tuple[int, int]]],
    weights: Mapping[str, object],
    prompts: Sequence[str] = (),
    sizes: Sequence[int] = (),
) -> None:
    """Lines of samples.jsonl against the books: the first groups of a batch, whose samples have these spans, in order.

    Where the books do not know `prompts` and the `sizes` of groups, of an evaluation, a row says how many it has.
    """
    begin = 0
    for place, (where, line) in enumerate(kept):
        row: dict[str, Any] = json_object(line)
        own = spans[begin : begin + (sizes[place] if sizes else len(row["versions"]))]
        begin += len(own)
        newest = [versions[-1][1] for versions in own]
        wanted: dict[str, object] = {"versions": [versions[0][1] for versions in own], "newest_versions": newest}
        wanted["weights"] = weights.get(str(max(newest)))
        if prompts:
            wanted["prompt_id"] = prompts[place]
        if "newest_versions" not in row and "weights" not in row:  # of a program that did not write them
            wanted = {key: value for key, value in wanted.items() if key in ("versions", "prompt_id")}
        for key, value in wanted.items():
            if row.get(key) != value:
                found = f"its {key} are {shown(row.get(key))}, and {shown(value)} in the books"
                raise refuted(where, NAMED, found, "it is forged")
