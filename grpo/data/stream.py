"""The order of prompts, exactly once: every epoch of a source is a permutation, and sources are mixed by weight.

With a curriculum a prompt's turn still comes once an epoch; it is then taken, or skipped and counted (`curriculum.py`).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from grpo.config.data import Curriculum
from grpo.data.curriculum import KEY, PassRates, parsed
from grpo.errors import DataError
from grpo.types import Chosen, Difficulty, Outcome, Prompt, Skipped

State = dict[str, object]
MOST_PROMPTS = 10_000_000


def digest(value: object) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class Stream(ABC):
    """What both kinds share: a curriculum, if there is one, that knows what became of prompts."""

    rates: PassRates | None = None

    def follow(self, curriculum: Curriculum | None) -> None:
        """Lets a curriculum choose from now on, which knows nothing yet."""
        self.rates = PassRates(curriculum) if curriculum else None

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, of whose outcomes nothing is known."""
        return self.choose(count).prompts

    @abstractmethod
    def choose(self, count: int, known: int = 0) -> Chosen:
        """The next `count` prompts; a curriculum knows the outcomes of batches up to `known`."""

    def record(self, batch: int, outcomes: Iterable[Outcome]) -> None:
        """What became of the prompts of a batch, in any order of batches."""
        if self.rates:
            self.rates.record(batch, outcomes)

    def recorded(self, batch: int) -> State:
        """What `restore` must find in a state, beside the place, to know the outcomes of batches up to that one."""
        return {KEY: self.rates.state(batch)} if self.rates else {}


class PromptStream(Stream):
    """Endless: every epoch is a permutation of all prompts that follows from the seed and the epoch's number alone.

    `began`, the time that the prompts' template has seen, is kept with the state, so that they can be made again.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, began: str = "") -> None:
        assert prompts, "load_prompts returns at least one prompt"
        self.prompts = prompts
        self.seed = seed
        self.began = began
        self.fingerprint = digest([prompt.id for prompt in prompts])
        self.tokens = digest([prompt.token_ids + prompt.completion_ids for prompt in prompts])
        self.skipped = 0
        self._start(epoch=0, position=0)

    def _start(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = sorted(range(len(self.prompts)), key=lambda index: digest([self.seed, epoch, index]))

    @property
    def turns(self) -> int:
        """Prompts whose turn has come so far: once an epoch each."""
        return self.epoch * len(self.prompts) + self.position

    @property
    def taken(self) -> int:
        """Prompts so far: those whose turn was not skipped."""
        return self.turns - self.skipped

    def choose(self, count: int, known: int = 0) -> Chosen:
        """The next `count` prompts, across the ends of epochs where need be."""
        chosen = Chosen([], [])
        while len(chosen.prompts) < count:
            if self.position == len(self.prompts):
                self._start(self.epoch + 1, position=0)
            prompt, difficulty = self._turn(known)
            self.position += 1
            if difficulty:
                chosen.skipped.append((prompt.id, difficulty))
            else:
                chosen.prompts.append(prompt)
        self.skipped += len(chosen.skipped)
        return chosen

    def _turn(self, known: int) -> tuple[Prompt, Difficulty | None]:
        """Whose turn it is, and why it is skipped, if it is."""
        index = self._order[self.position]
        prompt = self.prompts[index]
        difficulty = self.rates.difficulty(prompt.id, known) if self.rates else None
        if self.rates and difficulty and self.rates.draws(difficulty, digest([KEY, self.seed, self.epoch, index])):
            difficulty = None
        return prompt, difficulty

    def state(self) -> State:
        """Where the stream is, for JSON: what was taken before does not come again after `restore`."""
        where = {"tokens": self.tokens, "epoch": self.epoch, "position": self.position}
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return {**self._identity(), **where, **skipped, **_began(self.began)}

    def contents(self) -> list[State]:
        """What the order follows from, for JSON: seed and ids (source, first and last row)."""
        runs: list[list[str | int]] = []
        for prompt in self.prompts:
            source, _, number = prompt.id.rpartition(":")
            if runs and runs[-1][0] == source and runs[-1][2] == int(number) - 1:
                runs[-1][2] = int(number)
            else:
                runs.append([source, int(number), int(number)])
        return [{"name": "", "weight": 1.0, "seed": self.seed, "ids": runs}]

    def _identity(self) -> dict[str, str | int]:
        return {"fingerprint": self.fingerprint, "size": len(self.prompts), "seed": self.seed}

    def restore(self, state: Mapping[str, object]) -> None:
        """Resumes where `state` was taken. Raises DataError for a state of other prompts, or of another seed."""
        seen = parsed(state.get(KEY))
        self.go_to(state)
        if self.rates:
            self.rates.restore(seen)

    def go_to(self, state: Mapping[str, object]) -> None:
        """The part of `restore` that is the place. Raises DataError."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise DataError(
                    f"data: the saved order belongs to {name} {state.get(name)!r}, these prompts have {own!r}; resume "
                    "with the same data section, data files, model and run.seed, or start a new run"
                )
        if state.get("tokens", self.tokens) != self.tokens:  # an older checkpoint does not say them
            raise DataError(
                "data: rows, format and chat template are those of the run, but the token ids of the prompts are not: "
                "the tokenizer's files or the version of transformers are others, or the template writes what changes; "
                "resume with those that the run was begun with, or start a new run"
            )
        epoch, position, skipped = state.get("epoch"), state.get("position"), state.get("skipped", 0)
        if not (type(epoch) is int and type(position) is int and epoch >= 0 and 0 <= position <= len(self.prompts)):
            raise DataError(f"data: the saved order is damaged (epoch {epoch!r}, row {position!r}); start a new run")
        if type(skipped) is not int or not 0 <= skipped <= epoch * len(self.prompts) + position:
            raise DataError(f"data: the saved order is damaged ({skipped!r} turns were skipped); start a new run")
        self._start(epoch, position)
        self.skipped = skipped


class MixedStream(Stream):
    """Several streams, each in its own order; the next prompt is of the source that lags most behind its weight.

    So every stretch has the shares of the weights, up to one prompt a source. Turns that are skipped do not count.
    """

    def __init__(self, streams: Mapping[str, PromptStream], weights: Mapping[str, float], began: str = "") -> None:
        self.streams, self.weights = streams, weights
        self.began = began
        total = sum(Fraction(weights[name]) for name in streams)
        self.shares = {name: Fraction(weights[name]) / total for name in streams}

    def follow(self, curriculum: Curriculum | None) -> None:
        """As for one stream; all of them know the same."""
        super().follow(curriculum)
        for stream in self.streams.values():
            stream.rates = self.rates

    def choose(self, count: int, known: int = 0) -> Chosen:
        """The next `count` prompts."""
        prompts: list[Prompt] = []
        skipped: list[Skipped] = []
        made = {name: stream.taken for name, stream in self.streams.items()}
        while len(prompts) < count:
            after = sum(made.values()) + 1
            name = max(self.streams, key=lambda name: self.shares[name] * after - made[name])
            chosen = self.streams[name].choose(1, known)
            prompts += chosen.prompts
            skipped += chosen.skipped
            made[name] += 1
        return Chosen(prompts, skipped)

    def contents(self) -> list[State]:
        """What the order follows from, for JSON: each stream's contents, by name, with its weight."""
        own = {name: stream.contents()[0] for name, stream in self.streams.items()}
        return [{**of, "name": name, "weight": self.weights[name]} for name, of in own.items()]

    def state(self) -> State:
        """The states of all streams; the mix follows from them."""
        return {"sources": {name: stream.state() for name, stream in self.streams.items()}, **_began(self.began)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Resumes where `state` was taken. Raises DataError for other sources, and as each of the streams does."""
        saved = state.get("sources")
        names = sorted(saved) if isinstance(saved, dict) else None
        if not isinstance(saved, dict) or names != sorted(self.streams):
            raise DataError(
                f"data: the saved order belongs to the sources {names or 'none'}, these are {sorted(self.streams)}; "
                "resume with the same data section, or start a new run"
            )
        seen = parsed(state.get(KEY))
        before = {name: stream.state() for name, stream in self.streams.items()}
        try:
            for name, stream in self.streams.items():
                stream.go_to(saved[name] if isinstance(saved[name], dict) else {})
        except DataError:
            for name, stream in self.streams.items():
                stream.go_to(before[name])
            raise
        if self.rates:
            self.rates.restore(seen)


def _began(time: str) -> State:
    return {"began": time} if time else {}


def stream_of(contents: Sequence[State]) -> PromptStream | MixedStream:
    """A stream in the same order, of prompts that have nothing but their ids. Raises as bad contents make it."""
    streams, weights = {}, {}
    for of in contents:
        ids = [f"{source}:{row}" for source, first, last in _runs(of["ids"]) for row in range(first, last + 1)]
        name, seed, weight = of["name"], of["seed"], of["weight"]
        if not (ids and isinstance(name, str) and type(seed) is int and isinstance(weight, int | float) and weight > 0):
            raise ValueError("a stream has ids, a name, a seed and a weight above 0")
        streams[name] = PromptStream([Prompt(id, "", "", (), name) for id in ids], seed)
        weights[name] = weight
    if not streams:
        raise ValueError("there is no stream")
    return streams[""] if list(streams) == [""] else MixedStream(streams, weights)


def _runs(value: object) -> list[tuple[str, int, int]]:
    runs = [tuple(run) for run in value] if isinstance(value, list) else []
    if sum(last - first + 1 for _, first, last in runs) > MOST_PROMPTS:
        raise ValueError(f"a stream has at most {MOST_PROMPTS} prompts")
    return runs
