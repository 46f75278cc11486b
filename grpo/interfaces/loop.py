"""What the loop drives.

`Collector` makes the batch of a step from prompts, `Rollouts`, `Rewards` and advantages; `Trainer` learns from it;
`Weights` brings the policy to the engines; `Checkpoints` and `Recorder` keep what happened.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from grpo.checkpoint import Commit, Folders
from grpo.run.stopping import StopRequest
from grpo.types import (
    Chosen,
    EngineEvent,
    FileRecord,
    Group,
    Groups,
    Lane,
    Outcome,
    Prompt,
    Sample,
    Sampling,
    Skipped,
    Stats,
)


class PromptStream(Protocol):
    """An endless, seeded, exactly-once-per-epoch stream of prompts."""

    def take(self, count: int) -> list[Prompt]:
        """The next prompts, across the ends of epochs."""
        ...

    def choose(self, count: int, known: int = 0) -> Chosen:
        """The next prompts that a curriculum does not skip, by the outcomes of batches up to `known`, which it has."""
        ...

    def record(self, batch: int, outcomes: Iterable[Outcome]) -> None:
        """What became of the prompts of a batch. Batches may come in any order, from any thread."""
        ...

    def recorded(self, batch: int) -> Mapping[str, object]:
        """What was recorded of batches up to that one, to be added to `state`."""
        ...

    def state(self) -> Mapping[str, object]:
        """Where the stream is: what was taken before does not come again after `restore`."""
        ...

    def restore(self, state: Mapping[str, object]) -> None:
        """Goes back to where `state` was taken, and to what was recorded if that was added to it."""
        ...


DRAWN = "drawn.jsonl"
"""What was drawn ahead, among the attachments of a checkpoint."""


@dataclass(frozen=True)
class Batch:
    """What a step learns from: its groups, scored if they were sampled, their B samples with advantages, and counts.

    `skipped` are groups that were sampled for it and left out, as they teach nothing; `not_drawn` are prompts whose
    turn a curriculum skipped; `prompts` is where the stream of prompts is behind it.
    """

    groups: Groups
    samples: Sequence[Sample]
    stats: Stats
    skipped: Groups = ()
    prompts: Mapping[str, object] = field(default_factory=dict)
    not_drawn: Sequence[Skipped] = ()


class Collector(Protocol):
    """Makes batches: prompts, samples of known versions, rewards, advantages. All at once, or ahead of the loop."""

    held_out: Sequence[Prompt]
    """What `evaluate` samples; may be empty."""

    def next(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The batch of a step, in the order of steps; `sampled` is called when its samples are there.

        Whoever asks has trained all steps before and published what they owe. Raises WeightSyncError for a sample of
        other weights than the rule of versions allows (`run/clock.py`).
        """
        ...

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts, sampled from the weights of that step, and their scores."""
        ...

    def state(self) -> Mapping[str, object]:
        """Where the stream of prompts is, before the first batch."""
        ...

    def recorded(self, step: int) -> Mapping[str, object]:
        """What a resume behind that step must know beside what its batch said of the stream; asked for as `drawn` is.

        It is found at once, in the loop's thread: later steps take away what it is made of.
        """
        ...

    def drawn(self, step: int) -> Callable[[], bytes]:
        """What was drawn ahead when that step, the last that was asked for, is committed.

        The result waits until all is drawn that is to be, so another thread calls it, at any time. It raises what
        drawing raised.
        """
        ...

    def restore(self, step: int, prompts: Mapping[str, object], drawn: bytes) -> None:
        """Goes back to after a step.

        `prompts` is what its batch said, and what was recorded; `drawn` is what was drawn ahead then.
        """
        ...

    def stop_ahead(self) -> None:
        """Tells what works ahead to end; `restore` waits for that."""
        ...


class Rollouts(Protocol):
    """Engines that complete prompts; lost ones are replaced behind this face."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        """G samples of each prompt, in the order of the prompts.

        Seeds follow from the run's seed, step, prompt and its place in the step; the first one here has place `first`.
        """
        ...

    def abandon(self) -> None:
        """Drops what is still sampled for callers that no longer wait for it."""
        ...


class Rewards(Protocol):
    """What completions are worth."""

    @property
    def parts(self) -> Mapping[str, Sequence[float]]:
        """What each reward gave for the samples of the last `score`, by its name, before its weight."""
        ...

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with every sample's reward filled in, without samples whose reward failed."""
        ...

    def failures(self) -> Stats:
        """How many calls of the last `score` failed, by kind, and what was dropped for it."""
        ...


class Trainer(Protocol):
    """The ranks of the policy. Every verb raises TrainerLost when one of them died or froze."""

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """`train.epochs` passes of updates over the batch; the mean statistics of the updates."""
        ...

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        """The loss of these rows, under the weights as they are; nothing is learned."""
        ...

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Writes the whole state below an existing folder; what was written. No step is made meanwhile."""
        ...

    def snapshot(self, step: int) -> None:
        """Copies the whole state, as it is after that step, to where no step changes it."""
        ...

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """As `save`, from the copy of that step, in any thread; the next steps may be made meanwhile."""
        ...

    def committed(self) -> None:
        """A checkpoint was made: losses are counted from here on."""
        ...

    def load(self, commit: Commit) -> None:
        """Takes over the state that `save` or `write` wrote, whatever the number of ranks was."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether the node of a rank is about to go away."""
        ...

    def leave(self) -> None:
        """Ends the ranks, so that `rebuild` makes them elsewhere. Raises a TrainerLost that does not count."""
        ...

    def rebuild(self) -> None:
        """New ranks with the model as it was before the first step. Raises ClusterError if they are lost too often."""
        ...


class Weights(Protocol):
    """Brings the trainer's weights to the engines, verified every time; samples are stamped with their version.

    Engines or ranks that are new prove first that they follow each other (`weights/self_test.py`).
    """

    @property
    def version(self) -> int:
        """The version that healthy engines sample from."""
        ...

    @property
    def digests(self) -> Mapping[int, str]:
        """Digests of the versions that engines have taken, all compared with what the trainer sent."""
        ...

    def begin(self, version: int) -> Stats:
        """Brings the trainer's weights to all engines as that version, whatever was published before."""
        ...

    def publish(self, version: int) -> Stats:
        """Makes the trainer's weights a version that engines can have.

        Where nothing is sampled ahead, all engines sample from it afterwards. Else they take it by and by, beside
        training, which cannot change it any more.
        """
        ...

    def hold(self, version: int) -> None:
        """Waits until all engines sample from a published version; `in_flight` from it or a newer one."""
        ...


class Checkpoints(Folders, Protocol):
    """What a run resumes from."""

    def newest(self) -> Commit | None:
        """The newest whole one; None only if there never was one. Raises CheckpointError."""
        ...

    def check(self) -> None:
        """Raises Fenced if a newer start has taken the run, whose folder is changed by that one alone then."""
        ...


class Observer(Protocol):
    """Who is told how the actors of a role ("rollout", "trainer") are. Every call is a sign of progress."""

    def workers(self, role: str, ready: int, lost: int) -> None:
        """How many of them can work, and how many are lost and have no replacement yet that can."""
        ...

    def engines(self, wanted: int, healthy: int, joining: int) -> None:
        """How many engines the run asks for, how many sample, and how many are about to, once they have passed."""
        ...

    def engine(self, event: EngineEvent, name: str) -> None:
        """One of engines that come and go has joined or left those that sample, or could not join."""
        ...

    def policy_version(self, role: str, version: int, digest: str = "") -> None:
        """They hold the weights of that step; all engines, if there is a digest: it was verified, and is booked."""
        ...

    def recovered(self, role: str, error: Exception, seconds: float) -> None:
        """Something was lost and is replaced, `seconds` after that was noticed."""
        ...

    def starting(self, phase: str) -> None:
        """The start of the run is at this phase now (`run/start.py`); behind the start it means nothing."""
        ...

    def started(self, role: str, actors: Mapping[str, Stats]) -> None:
        """These actors have started, at the start of the run or in the place of lost ones: name to seconds by phase."""
        ...

    def alive(self) -> None:
        """Something that may take long has got on."""
        ...


class Recorder(Observer, Protocol):
    """Everything a person sees: progress line, metrics, samples.

    Steps and phases, and what is logged inside of them, are the main thread's. Any thread may call the other verbs.
    """

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around a whole step: its time, and one row of all that is logged inside."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a phase of the loop: its time; what a person sees as running."""
        ...

    def lane(self, lane: Lane, what: str, step: int) -> AbstractContextManager[None]:
        """Around what a pool does for the batch or version of a step, whatever the other one does meanwhile.

        `what` is a word like sample, reward, receive, switch, train, publish, commit or write; `observe/lanes.py` says
        which of them keep the pool's devices at work.
        """
        ...

    def log_sync(self, stats: Stats, digest: str) -> None:
        """Inside of a phase: a sync and the digest of its weights; "" if no engine has them yet."""
        ...

    def log_version(self, version: int, stats: Stats, digest: str) -> None:
        """Engines have taken that version beside the steps: a row of its own."""
        ...

    def log_step(
        self,
        step: int,
        groups: Groups,
        stats: Stats,
        skipped: Groups = (),
        not_drawn: Sequence[Skipped] = (),
    ) -> None:
        """Inside of a step: its scored groups, what was measured, and groups that were left out of the batch.

        `not_drawn` are prompts whose turn a curriculum skipped for it.
        """
        ...

    def log_eval(self, step: int, groups: Groups, scores: Stats) -> None:
        """Inside of a phase: scored held-out groups and their scores."""
        ...

    def log_commit(self, step: int, size: int, stats: Stats | None = None) -> None:
        """The newest checkpoint is that of `step` and has `size` bytes; what was measured has a row of its own."""
        ...

    def rewind(self, step: int, attachments: Mapping[str, bytes]) -> None:
        """Goes back to what was recorded when a checkpoint took the attachments; step 0 has none."""
        ...

    def attachments(self, step: int | None = None) -> dict[str, bytes]:
        """What a checkpoint must keep for `rewind`; of a `step` that is not the newest, nothing that came after it."""
        ...


@dataclass(frozen=True)
class Components:
    """What the loop drives; without `weights` there are no engines, and nobody takes them."""

    collector: Collector
    trainer: Trainer
    weights: Weights | None
    checkpoints: Checkpoints
    recorder: Recorder
    stop: StopRequest
