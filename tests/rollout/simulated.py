"""A loop around the collectors in which sampling, scoring and training take as long as a test says.

Weights are their version, a sample's tokens follow from prompt, seed and, token by token, the version that made them;
an update is a hash of the batch. So two runs are equal if and only if their weights are.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.config import Config
from grpo.interfaces import Batch, Collector, PromptStream
from grpo.rollout.ahead import AheadCollector
from grpo.rollout.collector import InlineCollector
from grpo.rollout.drawing import Drawer
from grpo.run.background import Background
from grpo.run.clock import Clock
from grpo.run.stopping import StopRequest
from grpo.types import Group, Groups, Prompt, Sample, Sampling, Stats
from tests.fakes import FakePrompts, FakeRecorder

Delay = Callable[[str, int], float]
"""(what, step) -> seconds that it takes."""
TOKENS = 4


def number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")


def quick(_what: str, _step: int) -> float:
    return 0.0


@dataclass
class Engines:
    """What the engines hold, as `Weights`, and what they sample, as `Rollouts`; `lengths` are tokens of a prompt."""

    in_flight: bool
    delay: Delay = quick
    length: Callable[[str], int] = lambda _: TOKENS
    version: int = -1
    published: dict[int, int] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    weights: Callable[[], int] = lambda: 0
    """Those of the trainer."""
    asked: list[tuple[int, int]] = field(default_factory=list)
    """(step, version at its begin) of every call, in order."""
    sampling: int = 0
    busy: float = 0.0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()

    @property
    def digest(self) -> str:
        return self.digests.get(self.version, "")

    def begin(self, version: int) -> Stats:
        self.published = {version: self.weights()}
        self.version = version
        return {}

    def publish(self, version: int) -> Stats:
        with self._changed:
            self.published[version] = self.weights()
            if self.in_flight:
                self.version = version
            self._changed.notify_all()
        return {}

    def hold(self, version: int) -> None:
        with self._changed:
            while version not in self.published and self.version < version:
                if not self._changed.wait(10):
                    raise AssertionError(f"version {version} never came")
            if not self.in_flight:
                assert self.sampling == 0 or self.version == version, "engines switch while they sample"
                self.version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        with self._changed:
            self.asked.append((step, self.version))
            self.sampling += 1
        seconds = self.delay("sample", step)
        versions = [self.version]
        began = time.monotonic()
        for _ in range(TOKENS - 1):
            time.sleep(seconds / TOKENS)
            versions.append(self.version)
        time.sleep(seconds / TOKENS)
        with self._changed:
            self.sampling -= 1
            self.busy += time.monotonic() - began
        return [
            Group(prompt, tuple(self._sample(prompt, index, step, place, versions) for index in range(count)))
            for count in [sampling.samples_per_prompt]
            for place, prompt in enumerate(prompts, first)
        ]

    def _sample(self, prompt: Prompt, index: int, step: int, place: int, versions: list[int]) -> Sample:
        made = [(version, self.published.get(version, 0)) for version in versions]
        ids = tuple(number(prompt.id, index, step, place, at, weights) % 97 for at, (_, weights) in enumerate(made))
        spans = [(at, v) for at, v in enumerate(versions) if at == 0 or versions[at - 1] != v]
        logprobs = tuple(-0.1 * token for token in ids)
        return Sample(prompt.id, index, prompt.token_ids, ids, logprobs, tuple(spans), "stop", str(sum(ids)))

    def abandon(self) -> None:
        pass


@dataclass
class Parity:
    """1 for an even number, as `Rewards`."""

    delay: Delay = quick
    scored: int = 0

    def score(self, groups: Groups) -> list[Group]:
        self.scored += 1
        time.sleep(self.delay("score", self.scored))
        return [
            replace(
                group, samples=tuple(replace(each, reward=float(int(each.text) % 2 == 0)) for each in group.samples)
            )
            for group in groups
        ]

    @property
    def parts(self) -> dict[str, list[float]]:
        return {}

    def failures(self) -> Stats:
        return {}


class Recording(FakeRecorder):
    """Lanes from several threads: nothing is checked."""

    @contextlib.contextmanager
    def lane(self, lane: str, what: str, step: int) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


@dataclass
class State:
    """What a checkpoint of the loop holds."""

    step: int
    weights: int
    prompts: Mapping[str, object]
    drawn: bytes


class Loop:
    """Trains batch after batch; what it did is in `batches`, `weights` and `seconds`."""

    def __init__(
        self,
        config: Config,
        delay: Delay = quick,
        length: Callable[[str], int] = lambda _: TOKENS,
        prompts: PromptStream | None = None,
    ) -> None:
        self.config, self.delay = config, delay
        self.weights, self.step = 0, 0
        self.batches: dict[int, Batch] = {}
        self.history: dict[int, int] = {0: 0}
        self.clock = Clock.of(config, held_out=False)
        at_once = self.clock.in_flight or not self.clock.staleness  # engines take what is published
        self.engines = Engines(at_once, delay, length, weights=lambda: self.weights)
        self.stop, self.background = StopRequest(30), Background()
        drawer = Drawer(config, prompts or FakePrompts(), self.engines, Parity(delay))
        parts = (drawer, self.engines, Recording([]), self.stop, ())
        ahead = config.rollout.max_staleness > 0
        self.collector: Collector = AheadCollector(*parts, self.background) if ahead else InlineCollector(*parts)
        self.start = State(0, 0, self.collector.state(), b"")
        self.busy = 0.0

    def resume(self, state: State) -> None:
        self.collector.stop_ahead()
        self.step, self.weights = state.step, state.weights
        self.collector.restore(state.step, state.prompts, state.drawn)
        self.engines.begin(state.step)

    def advance(self) -> Callable[[], State]:
        """One step; the state after it, for whoever waits."""
        step = self.step + 1
        batch = self.batches[step] = self.collector.next(step, lambda: None)
        began = time.monotonic()
        time.sleep(self.delay("train", step))
        self.busy += time.monotonic() - began
        rows: list[Any] = [[row.prompt_id, row.output_ids, row.logprobs, row.advantage] for row in batch.samples]
        self.weights, self.step = number(self.weights, rows), step
        self.history[step] = self.weights
        if self.clock.published(step):
            self.engines.publish(step)
        weights, drawn = self.weights, self.collector.drawn(step)
        prompts = {**batch.prompts, **self.collector.recorded(step)}
        return lambda: State(step, weights, prompts, drawn())

    def run(self, steps: int) -> "Loop":
        """From the start."""
        self.resume(self.start)
        try:
            while self.step < steps:
                self.advance()
        finally:
            self.close()
        return self

    def close(self) -> None:
        self.collector.stop_ahead()
        assert self.background.join(10)


def make_config(staleness: int, update: str = "between_batches", steps: int = 6, **sections: Any) -> Config:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_staleness": staleness, "update": update}
    base = {"model": {"path": "x"}, "run": {"steps": steps}, "eval": {"prompts": 0}}
    extra = sections.pop("rollout", {})
    return Config.model_validate(base | {"rollout": rollout | extra} | sections)
