"""The rules that a batch keeps: its prompts are the next of the stream, its versions those that the clock allows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo.observe.audit.proof import refuted, shown
from grpo.run.clock import Clock

Spans = tuple[tuple[int, int], ...]
PROMPTS = "every prompt comes once an epoch, in the order of the seed"
"""Or is skipped by a curriculum, which is checked beside it."""
VERSIONS = "a sample comes from weights that the clock allows"
DIGESTS = "weights that made samples were verified on the engines"


def check_prompts(where: str, wanted: Sequence[str], kept: list[str], skipped: list[str], n: int) -> None:
    """The next prompts of the stream are those that were trained, skipped, and `n` that were dropped."""
    if not skipped and not n:
        places = [place for place, pair in enumerate(zip(wanted, kept, strict=True)) if pair[0] != pair[1]]
        if places:
            place = places[0]
            raise _odd(where, kept[place], wanted[place])
        return
    ways = {(0, 0)}  # how many of both lists lie before a place; the rest of what lies before it was dropped
    for place, prompt in enumerate(wanted):
        after: set[tuple[int, int]] = set()
        for one, other in ways:
            if one < len(kept) and kept[one] == prompt:
                after.add((one + 1, other))
            if other < len(skipped) and skipped[other] == prompt:
                after.add((one, other + 1))
            if place - one - other < n:
                after.add((one, other))
        if not after:
            one, other = max(ways, key=sum)
            raise _odd(where, (kept[one:] or skipped[other:])[0], prompt)
        ways = after


def _odd(where: str, found: str, wanted: str) -> Exception:
    meaning = "one came twice, is missing, or two are exchanged"
    return refuted(where, PROMPTS, f"{shown(found)} stands where {shown(wanted)} comes next", meaning)


class Versions:
    """Which weights samples may have, as the books go on."""

    def __init__(self) -> None:
        self.clocks: list[Clock] = []
        self.synced: dict[int, set[str]] = {}
        self._here: set[int] = set()

    def resume(self, clock: Clock) -> None:
        """A start, or a return to a checkpoint."""
        self.clocks.append(clock)
        self._here = set()

    def sync(self, version: int, digest: str, carried: bool) -> None:
        """All engines have these weights; `carried`: in a start before."""
        self.synced.setdefault(version, set()).add(digest)
        if not carried:
            self._here.add(version)

    def check(self, where: str, step: int, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Samples of the batch of a step."""
        ranges = [self._range(clock, step) for clock in self._allowed(step)]
        for versions in {tuple(version for _, version in each) for each in spans}:
            first, last = min(versions), max(versions)
            if list(versions) != sorted(versions):
                raise refuted(
                    where, "engines only take newer weights", f"a sample goes {shown(versions)}", "it is forged"
                )
            if not any(low <= first and last <= high for low, high in ranges):
                low, high = ranges[0]
                rule = f"{VERSIONS} ({low} to {high} here)" if low < high else f"{VERSIONS} (version {low} here)"
                odd, meaning = (first, "it is too old") if first < low else (last, "no engine could have it then")
                raise refuted(where, rule, f"one is of version {odd}", meaning)

    def check_digests(self, where: str, used: set[int], weights: Mapping[str, object]) -> None:
        """What the row says of its versions."""
        if {str(version) for version in used} != set(weights):
            raise refuted(
                where, DIGESTS, f"it names {shown(sorted(weights))}, samples are of {sorted(used)}", "it is forged"
            )
        for version in used:
            if weights[str(version)] not in self.synced.get(version, ()):
                found = f"digest {shown(weights[str(version)])} of version {version} is that of no sync"
                raise refuted(where, DIGESTS, found, "samples are of weights that nobody has compared")

    def _allowed(self, step: int) -> Iterator[Clock]:
        """The clock of this start; of starts before where the batch may have been drawn ahead in one."""
        for place in range(len(self.clocks) - 1, -1, -1):
            yield self.clocks[place]
            if place and step > self.clocks[place].base + self.clocks[place - 1].staleness:
                return

    def _range(self, clock: Clock, step: int) -> tuple[int, int]:
        low, high = clock.oldest(step), clock.newest(step)
        if clock.staleness == 0 and clock is self.clocks[-1]:  # engines have the newest that was brought to them
            low = high = max((version for version in self._here if version < step), default=low)
            low = max(low, clock.oldest(step))
        return low, high


def spans_of(runs: Sequence[Any]) -> list[Spans]:
    """Versions of each sample, in order. Raises ValueError and the like for what no run writes."""
    spans: list[Spans] = []
    for count, flat in runs:
        pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
        starts = [start for start, _ in pairs]
        if not pairs or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("spans begin at 0 and rise")
        if not (type(count) is int and 0 < count < 1 << 21 and len(spans) < 1 << 21):
            raise ValueError("no run has so many samples")
        spans += [tuple((start, natural(version)) for start, version in pairs)] * count
    return spans


def natural(value: object) -> int:
    """A count. Raises ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} is no count")
    return value
