"""Which prompts a curriculum skips: those that were always or never right when they were last sampled, by a coin.

The coin follows from seed, epoch and prompt. Pass rates count from a given batch on and not from when they are known,
so a choice is a function of seeds and outcomes, whatever takes long, whoever dies, and wherever a run resumes.
"""

import threading
from collections.abc import Iterable, Mapping

from grpo.config.data import Curriculum
from grpo.errors import DataError
from grpo.types import Difficulty, Outcome

KEY = "curriculum"
"""Of what a stream's state holds of it."""
FURTHEST = 64
"""Batches that a choice may be ahead of the outcomes that it is made by: the bound of rollout.max_staleness."""
DIGITS = 16
SIDES = 16.0**DIGITS
"""Of the coin."""
Entry = tuple[int, int, int]
"""Batch, right completions, all completions."""


class PassRates:
    """How often prompts were right, batch by batch; threads may ask and record at any time.

    What it answers for a batch depends on the outcomes of batches up to that one alone, in whatever order they came.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self._lock = threading.Lock()
        self._newest = 0
        self._seen: dict[str, tuple[Entry, ...]] = {}
        """Of each prompt, in the order of batches: all that a state may need, and maybe older ones."""

    def record(self, batch: int, outcomes: Iterable[Outcome]) -> None:
        """What became of the prompts of a batch; one that it holds twice counts with all its completions."""
        together: dict[str, tuple[int, int]] = {}
        for prompt_id, right, of in outcomes:
            before = together.get(prompt_id, (0, 0))
            together[prompt_id] = before[0] + right, before[1] + of
        with self._lock:
            self._newest = max(self._newest, batch)
            for prompt_id, (right, of) in together.items():
                others = [entry for entry in self._seen.get(prompt_id, ()) if entry[0] != batch]
                self._seen[prompt_id] = self._kept(sorted([*others, (batch, right, of)]), self._newest - 3 * FURTHEST)

    def difficulty(self, prompt_id: str, known: int) -> Difficulty | None:
        """What the outcomes of batches up to `known` say of a prompt; None: neither, or nothing is known."""
        with self._lock:
            entries = [entry for entry in self._seen.get(prompt_id, ()) if entry[0] <= known][-self.curriculum.window :]
        if not entries:
            return None
        rate = sum(right for _, right, _ in entries) / sum(of for _, _, of in entries)
        if rate >= self.curriculum.easy_threshold:
            return "easy"
        return "hard" if rate <= self.curriculum.hard_threshold else None

    def draws(self, difficulty: Difficulty, coin: str) -> bool:
        """Whether a prompt is drawn all the same; the coin is a text of hex digits."""
        fraction = self.curriculum.easy_fraction if difficulty == "easy" else self.curriculum.hard_fraction
        return int(coin[:DIGITS], 16) < fraction * SIDES

    def state(self, batch: int) -> dict[str, list[Entry]]:
        """What a resume behind a batch must know, for JSON; it says nothing of later ones. By prompt, in order."""
        with self._lock:
            every = [(name, self._seen[name]) for name in sorted(self._seen)]
        known: dict[str, list[Entry]] = {}
        for prompt_id, entries in every:
            if len(entries) > self.curriculum.window or entries[-1][0] > batch:
                entries = self._kept([entry for entry in entries if entry[0] <= batch], batch - FURTHEST)
            if entries:
                known[prompt_id] = list(entries)
        return known

    def _kept(self, entries: list[Entry], old: int) -> tuple[Entry, ...]:
        """All of batches behind `old`, and the last ones up to it that make a pass rate."""
        first = max(0, sum(entry[0] <= old for entry in entries) - self.curriculum.window)
        return tuple(entries[first:])

    def restore(self, seen: Mapping[str, tuple[Entry, ...]]) -> None:
        """Knows what `parsed` made of a state, and nothing else."""
        with self._lock:
            self._seen = dict(seen)
            self._newest = max((entries[-1][0] for entries in seen.values()), default=0)


def parsed(state: object) -> dict[str, tuple[Entry, ...]]:
    """What `PassRates.state` has made; nothing of None. Raises DataError for anything else."""
    if state is None:
        return {}
    try:
        assert isinstance(state, Mapping)
        return {prompt_id: _entries(entries) for prompt_id, entries in state.items()}
    except (AssertionError, TypeError, ValueError):
        raise DataError(
            "data.curriculum: the saved pass rates are damaged; remove this checkpoint's folder, so that the one "
            "before is used, or start a new run"
        ) from None


def _entries(rows: Iterable[Iterable[int]]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for batch, right, of in rows:
        assert all(type(number) is int for number in (batch, right, of)) and batch > 0 and 0 <= right <= of and of > 0
        assert not entries or batch > entries[-1][0]
        entries.append((batch, right, of))
    assert entries
    return tuple(entries)
