"""What the loop drives.

`Collector` makes the batch of a step from prompts, `Rollouts`, `Rewards` and advantages; `Trainer` learns from it;
`Weights` brings the policy to the engines; `Checkpoints` and `Recorder` keep what happened.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from grpo.checkpoint import Commit
from grpo.run.stopping import StopRequest
from grpo.types import FileRecord, Group, Groups, Prompt, Sample, Sampling, Stats


class PromptStream(Protocol):
    """An endless, seeded, exactly-once-per-epoch stream of prompts."""

    def take(self, count: int) -> list[Prompt]:
        """The next prompts, across the ends of epochs."""
        ...

    def state(self) -> Mapping[str, object]:
        """Where the stream is: what was taken before does not come again after `restore`."""
        ...

    def restore(self, state: Mapping[str, object]) -> None:
        """Goes back to where `state` was taken."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a step learns from: its scored groups, their B samples with advantages, in order, and what was counted."""

    groups: Groups
    samples: Sequence[Sample]
    stats: Stats


class Collector(Protocol):
    """Makes batches: prompts, samples of known versions, rewards, advantages."""

    held_out: Sequence[Prompt]
    """What `evaluate` samples; may be empty."""

    def collect(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The batch of a step, from the next prompts; `sampled` is called between sampling and scoring.

        Raises WeightSyncError for a sample of other weights.
        """
        ...

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts, sampled after that step, and their scores."""
        ...

    def state(self) -> Mapping[str, object]:
        """Where the stream of prompts is, as of the last batch."""
        ...

    def restore(self, state: Mapping[str, object]) -> None:
        """Goes back to where `state` was taken."""
        ...


class Rollouts(Protocol):
    """Engines that complete prompts; lost ones are replaced behind this face."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        """G samples of each prompt, in the order of the prompts; seeds follow from the run's seed, step and prompt."""
        ...


class Rewards(Protocol):
    """What completions are worth."""

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with every sample's reward filled in, without samples whose reward failed."""
        ...

    def failures(self) -> Stats:
        """How many calls of the last `score` failed, by kind, and what was dropped for it."""
        ...


class Trainer(Protocol):
    """The ranks of the policy. Every verb raises TrainerLost when one of them died or froze."""

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """`train.epochs` passes of clipped policy updates over the batch; the mean statistics of the updates."""
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
    """Brings the trainer's weights to the engines."""

    @property
    def version(self) -> int:
        """The version that healthy engines sample from."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the weights that were last sent."""
        ...

    def sync(self, version: int) -> Stats:
        """Sends the trainer's weights to every engine, verified; the engines stamp `version` on their samples.

        Engines or ranks that are new prove first that they follow each other (`weights/self_test.py`).
        """
        ...


class Checkpoints(Protocol):
    """What a run resumes from."""

    renamed_at: float
    """When, by time.monotonic(), the last commit got its name."""

    def newest(self) -> Commit | None:
        """The newest whole one; None only if there never was one. Raises CheckpointError."""
        ...

    def begin(self, step: int) -> str:
        """Path or URL of a fresh folder for the files of a step."""
        ...

    def commit(
        self,
        step: int,
        records: Sequence[FileRecord],
        state: Mapping[str, object],
        score: float | None,
        attachments: Mapping[str, bytes],
    ) -> Commit:
        """Makes the files of `begin`'s folder, with state and attachments, the newest checkpoint."""
        ...


class Observer(Protocol):
    """Who is told how the actors of a role ("rollout", "trainer") are. Every call is a sign of progress."""

    def workers(self, role: str, ready: int, lost: int) -> None:
        """How many of them can work, and how many are lost and have no replacement yet that can."""
        ...

    def policy_version(self, role: str, version: int) -> None:
        """They hold the weights of that step."""
        ...

    def recovered(self, role: str, error: Exception, seconds: float) -> None:
        """Something was lost and is replaced, `seconds` after that was noticed."""
        ...

    def alive(self) -> None:
        """Something that may take long has got on."""
        ...


class Recorder(Observer, Protocol):
    """Everything a person sees: progress line, metrics, samples."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around a whole step: its time, and one row of all that is logged inside."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a phase of the loop: its time; what a person sees as running."""
        ...

    def log_sync(self, stats: Stats, digest: str) -> None:
        """Inside of a phase: a verified sync and the digest of its weights."""
        ...

    def log_step(self, step: int, groups: Groups, stats: Stats) -> None:
        """Inside of a step: its scored groups and what was measured."""
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

    def attachments(self) -> dict[str, bytes]:
        """What a checkpoint must keep for `rewind`."""
        ...


@dataclass(frozen=True)
class Components:
    """What the loop drives."""

    collector: Collector
    trainer: Trainer
    weights: Weights
    checkpoints: Checkpoints
    recorder: Recorder
    stop: StopRequest
