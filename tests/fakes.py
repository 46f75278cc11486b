"""The controller's Protocols as implementations without torch or ray; all write what happens into `events`."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.checkpoint import Commit
from grpo.errors import ClusterError, TrainerLost
from grpo.store import open_store
from grpo.types import Chosen, FileRecord, Group, Outcome, Prompt, Sample, Sampling, Skipped, Stats


def prompt(number: int) -> Prompt:
    return Prompt(id=f"fake:{number}", question=f"{number}+1?", answer=f"#### {number + 1}", token_ids=(1, 2, number))


def sample(of: Prompt, index: int, version: int, text: str = "#### 1") -> Sample:
    ids = (7, 8, 9)
    return Sample(
        prompt_id=of.id,
        index=index,
        prompt_ids=of.token_ids,
        output_ids=ids,
        logprobs=(-0.5,) * len(ids),
        versions=((0, version),),
        finish_reason="stop",
        text=text,
    )


@dataclass
class FakePrompts:
    """Numbers its prompts from 0, for ever."""

    taken: int = 0

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]

    def take(self, count: int) -> list[Prompt]:
        self.taken += count
        return [prompt(number) for number in range(self.taken - count, self.taken)]

    def choose(self, count: int, known: int = 0) -> Chosen:
        return Chosen(self.take(count), [])

    def record(self, batch: int, outcomes: Iterable[Outcome]) -> None:
        raise AssertionError("without a curriculum nobody asks what became of prompts")

    def recorded(self, batch: int) -> dict[str, Any]:
        return {}


@dataclass
class FakeWeights:
    """Engines that hold the version of the last sync, unless `lost` syncs never reach them."""

    events: list[str]
    version: int = -1
    lost: frozenset[int] = frozenset()
    engines: int = -1
    """The version that samples are stamped with."""

    @property
    def digest(self) -> str:
        return f"digest {self.version}"

    @property
    def digests(self) -> dict[int, str]:
        return {self.version: self.digest}

    def hold(self, version: int) -> None:
        assert version == self.version

    def begin(self, version: int) -> Stats:
        return self.publish(version)

    def publish(self, version: int) -> Stats:
        self.events.append(f"sync {version}")
        self.version = version
        if version not in self.lost:
            self.engines = version
        return {"sync_version": float(version)}


@dataclass
class FakeRollouts:
    """Answers with `texts`, one for each sample of a prompt, stamped with the version that the engines hold."""

    events: list[str]
    weights: FakeWeights
    texts: Sequence[str] = ("#### 1", "#### 2")
    samplings: list[Sampling] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)

    def abandon(self) -> None:
        self.events.append("abandon")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        self.events.append(f"generate {step}")
        self.samplings.append(sampling)
        self.versions.append((step, self.weights.engines))
        texts = [self.texts[index % len(self.texts)] for index in range(sampling.samples_per_prompt)]
        return [
            Group(each, tuple(sample(each, index, self.weights.engines, text) for index, text in enumerate(texts)))
            for each in prompts
        ]


@dataclass
class FakeRewards:
    """1 for the text `right`, else 0."""

    events: list[str]
    right: str = "#### 1"

    @property
    def parts(self) -> dict[str, list[float]]:
        return {}

    def failures(self) -> Stats:
        return {}

    def score(self, groups: Sequence[Group]) -> list[Group]:
        self.events.append("score")
        return [
            Group(group.prompt, tuple(replace(each, reward=float(each.text == self.right)) for each in group.samples))
            for group in groups
        ]


@dataclass
class FakeTrainer:
    """Counts its updates; `lost_at` are the events ("step 3", "save 2", "load 2") at which a rank dies, once each.

    `drained_at` are steps after which the node of a rank is about to go away, until the ranks are elsewhere.
    """

    events: list[str]
    batches: list[list[Sample]] = field(default_factory=list)
    updates: int = 0
    lost_at: list[str] = field(default_factory=list)
    drained_at: list[int] = field(default_factory=list)
    leaving: bool = False
    rebuilds: int = 3
    copied: dict[int, int] = field(default_factory=dict)
    writing: Callable[[int], None] = lambda step: None
    """What writing a step waits for or fails with."""
    safe: int = 0
    """How often it was told of a commit."""

    def _event(self, event: str) -> None:
        self.events.append(event)
        if event in self.lost_at:
            self.lost_at.remove(event)
            raise TrainerLost(f"rank 1 died in {event}")

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        self._event(f"step {step}")
        self.batches.append(list(batch))
        self.updates += 1
        self.leaving |= step in self.drained_at
        return {"loss": float(self.updates)}

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        self.snapshot(step)
        return self.write(folder, step)

    def snapshot(self, step: int) -> None:
        self._event(f"save {step}")
        self.copied = {step: self.updates}

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """In another thread than all other verbs, so it tells nobody."""
        if f"write {step}" in self.lost_at:
            self.lost_at.remove(f"write {step}")
            raise TrainerLost(f"rank 1 died while it wrote step {step}")
        self.writing(step)
        Path(folder, "trainer.json").write_text(str(self.copied[step]))
        return open_store(folder).publish(Path(folder), "")

    def committed(self) -> None:
        self.safe += 1

    def load(self, commit: Commit) -> None:
        self._event(f"load {commit.step}")
        self.updates = int(commit.read("trainer.json"))

    def leave(self) -> None:
        self.events.append("leave")
        raise TrainerLost("their node drains", counts=False)

    def rebuild(self) -> None:
        self.events.append("rebuild")
        self.leaving = False
        self.updates = 0
        self.rebuilds -= 1
        if self.rebuilds < 0:
            raise ClusterError("lost too often")


@dataclass
class FakeFence:
    """A lease that nobody disputes."""

    attempt: int = 1

    def check(self) -> None:
        pass


@dataclass
class FakeRecorder:
    """Keeps what it is shown; `open` names the step and phase that time would be counted to."""

    events: list[str]
    phases: list[str] = field(default_factory=list)
    steps: dict[int, Stats] = field(default_factory=dict)
    scores: dict[int, Stats] = field(default_factory=dict)
    syncs: list[Stats] = field(default_factory=list)
    commits: list[tuple[int, int]] = field(default_factory=list)
    measured: list[Stats] = field(default_factory=list)
    """What was measured of each commit."""
    lanes: list[tuple[str, str, int]] = field(default_factory=list)
    versions: list[tuple[int, str]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    """Phases of the start."""
    pool: tuple[int, int, int] = (0, 0, 0)
    """Engines wanted, healthy and joining."""
    actors: dict[str, Stats] = field(default_factory=dict)
    """What the start of each took."""

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        with self._opened(f"step {step}"):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append("/".join([*self.open, name]))
        with self._opened(name):
            yield

    @contextmanager
    def _opened(self, name: str) -> Iterator[None]:
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()

    def log_sync(self, stats: Stats, digest: str) -> None:
        assert self.open[-1] == "weight_sync"
        self.syncs.append(stats)

    @contextmanager
    def lane(self, lane: str, what: str, step: int) -> Iterator[None]:
        self.lanes.append((lane, what, step))
        yield

    def log_version(self, version: int, stats: Stats, digest: str) -> None:
        self.events.append(f"log_version {version}")
        self.versions.append((version, digest))

    def attachments(self, step: int | None = None) -> dict[str, bytes]:
        kept = {made: stats for made, stats in list(self.steps.items()) if step is None or made <= step}
        return {"steps.json": json.dumps(kept).encode()}

    def rewind(self, step: int, attachments: Mapping[str, bytes]) -> None:
        self.events.append(f"rewind {step}")
        kept = json.loads(attachments.get("steps.json", b"{}"))
        self.steps = {int(step): stats for step, stats in kept.items()}

    def recovered(self, role: str, error: Exception, seconds: float) -> None:
        self.events.append(f"recovered {role}")

    def starting(self, phase: str) -> None:
        self.starts.append(phase)

    def started(self, role: str, actors: Mapping[str, Stats]) -> None:
        self.actors |= actors

    def workers(self, role: str, ready: int, lost: int) -> None:
        self.events.append(f"workers {role}: {ready} ready, {lost} lost")

    def engines(self, wanted: int, healthy: int, joining: int) -> None:
        self.pool = (wanted, healthy, joining)

    def engine(self, event: str, name: str) -> None:
        self.events.append(f"{name} {event}")

    def policy_version(self, role: str, version: int, digest: str = "") -> None:
        self.events.append(f"{role} has {version}")

    def alive(self) -> None:
        pass

    def log_commit(self, step: int, size: int, stats: Stats | None = None) -> None:
        self.commits.append((step, size))
        self.measured.append(stats or {})

    def log_step(
        self,
        step: int,
        groups: Sequence[Group],
        stats: Stats,
        skipped: Sequence[Group] = (),
        not_drawn: Sequence[Skipped] = (),
    ) -> None:
        self.events.append(f"log_step {step}")
        self.steps[step] = stats

    def log_eval(self, step: int, groups: Sequence[Group], scores: Stats) -> None:
        self.events.append(f"eval {step}")
        self.scores[step] = scores
