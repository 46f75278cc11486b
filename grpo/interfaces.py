"""What the loop drives, as Protocols: `cluster` and `rollout` have the real parts, tests bring fakes.

From the loop down: `Collector` makes the batch of a step from prompts, `Rollouts`, `Rewards` and advantages; `Trainer`
learns from it; `Weights` brings the policy to the engines; `Checkpoints` and `Recorder` keep what happened. Below them
are the workers, whose verbs are methods that begin at once and return a `Call`: `Engine`, which is a `Sampler` and a
`WeightReceiver`, and `TrainerRank`.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from grpo.checkpoint import Commit
from grpo.errors import GrpoError
from grpo.run.stopping import StopRequest
from grpo.types import FileRecord, Group, Groups, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, eq=False)
class Call(Generic[R_co]):
    """A verb under way on a worker. Whoever waits for it does so with a deadline (`cluster/waiting.py`)."""

    worker: "Worker"
    future: "Future[R_co]"

    @property
    def result(self) -> R_co:
        """Of a call that has ended well."""
        return self.future.result(timeout=0)


class Place(NamedTuple):
    """Where a worker runs: the id of its node, and the pids of its processes there, its own first; none if not ours."""

    node_id: str
    pids: list[int]


class Transfer(NamedTuple):
    """Where weights change hands: the sender is place 0 of `size`, each receiver of an engine has a place after it.

    `url` says how they travel: tcp://host:port is a process group that meets there.
    """

    url: str
    size: int


class Worker(Protocol):
    """Who is called: an actor with an engine or a rank in it, or something that is reached in another way."""

    role: str
    index: int
    node_id: str
    pids: list[int]
    lost: GrpoError | None

    def ping(self, seconds: float) -> Call[object]:
        """A sign of life of its process, beside whatever it is doing."""
        ...

    def close(self) -> Call[None]:
        """Ends it in order."""
        ...

    def end(self) -> None:
        """Ends it by force, with all that it has started."""
        ...

    def stacks(self) -> str:
        """What its processes are doing, for a person."""
        ...

    def wanted_node(self) -> str:
        """What a node must have to host it, as long as no such node was found; "" once it has a place or needs none."""
        ...

    def node_is_lost(self) -> bool:
        """Whether the node that it was given is gone."""
        ...


class Sampler(Worker, Protocol):
    """Completes prompts."""

    def start(self) -> Call[Place]:
        """Loads the model. Raises ConfigError if it cannot be loaded, ClusterError if the engine does not start."""
        ...

    def health(self, seconds: float) -> Call[object]:
        """A sign of life of the engine: it makes a token, or is busy and says so. Raises EngineLost."""
        ...

    def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> Call[list[Group]]:
        """G samples of each prompt, in order; a request is a prompt and the seed of its first sample."""
        ...

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        """Logprobs of tokens 1..T-1 at temperature 1, under the weights that were received last."""
        ...


class WeightReceiver(Worker, Protocol):
    """Takes weights: received, compared by the caller, and only then committed."""

    receivers: int
    """Places that it takes in a transfer."""

    def join_transfer(self, transfer: Transfer, place: int) -> Call[None]:
        """Leaves the transfer before and joins this one; its first receiver has this place."""
        ...

    def receive_weights(self, version: int, records: tuple[TensorRecord, ...]) -> Call[list[Manifest]]:
        """Takes the announced tensors; what each receiver took. Nothing is sampled until they are committed."""
        ...

    def commit_weights(self, version: int) -> Call[None]:
        """Forgets what older weights computed; from now on samples carry this version. 0 also commits `model.path`."""
        ...


class Engine(Sampler, WeightReceiver, Protocol):
    """One rollout engine."""


class TrainerRank(Worker, Protocol):
    """One rank of the policy; every verb but those of the transfer is called on all ranks together."""

    def address(self) -> Call[tuple[str, int]]:
        """Host and a free port for the ranks' rendezvous."""
        ...

    def start(self, host: str, port: int) -> Call[Place]:
        """Loads the model and meets the other ranks."""
        ...

    def step(self, batch: Sequence[Sample], step: int) -> Call[Stats]:
        """All updates of a step."""
        ...

    def save(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        """Writes its share of the whole state below a folder of the store; what it wrote."""
        ...

    def load(self, folder: str, names: Sequence[str], step: int) -> Call[None]:
        """Takes over what all ranks of that time have saved."""
        ...

    def records(self) -> Call[tuple[TensorRecord, ...]]:
        """Names, shapes and dtypes of the weights, in the order in which they are sent."""
        ...

    def offer_transfer(self) -> Call[str]:
        """Rank 0: where engines may meet it; the url of a `Transfer`."""
        ...

    def open_transfer(self, transfer: Transfer) -> Call[None]:
        """Rank 0: joins a transfer that it has offered, as its sender; the one before is left."""
        ...

    def send_weights(self, version: int) -> Call[Manifest | None]:
        """Sends every tensor; None on the ranks that only help to gather them."""
        ...

    def perturb(self, scale: float, seed: int) -> Call[None]:
        """Adds noise of `scale` times each tensor's root mean square, the same on all ranks, until `restore`."""
        ...

    def restore(self) -> Call[None]:
        """Undoes `perturb`, bit for bit."""
        ...

    def logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        """Logprobs of tokens 1..T-1 at temperature 1, under the live weights."""
        ...


class PromptStream(Protocol):
    """An endless, seeded, exactly-once-per-epoch stream of prompts."""

    def take(self, count: int) -> list[Prompt]:
        """The next prompts, across the ends of epochs."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the stream is: what was taken before does not come again after `restore`."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
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

    def collect(self, step: int) -> Batch:
        """The batch of a step, from the next prompts. Raises WeightSyncError for a sample of other weights."""
        ...

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts, sampled after that step, and their scores."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the stream of prompts is, as of the last batch."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        ...


class Rollouts(Protocol):
    """Engines that complete prompts; lost ones are replaced behind this face."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        """G samples of each prompt, in the order of the prompts; seeds follow from the run's seed, step and prompt."""
        ...


class Rewards(Protocol):
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
        """Writes the whole state below an existing folder; what was written."""
        ...

    def load(self, commit: Commit) -> None:
        """Takes over the state that `save` wrote, whatever the number of ranks was."""
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

        Engines or ranks that are new prove first that they follow each other (`weights/selftest.py`).
        """
        ...


class Checkpoints(Protocol):
    def newest(self) -> Commit | None: ...

    def begin(self, step: int) -> str: ...

    def commit(
        self,
        step: int,
        records: Sequence[FileRecord],
        state: dict[str, Any],
        score: float | None,
        attachments: Mapping[str, bytes],
    ) -> Commit: ...


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

    def step(self, step: int) -> AbstractContextManager[None]: ...

    def phase(self, name: str) -> AbstractContextManager[None]: ...

    def log_sync(self, stats: Stats, digest: str) -> None: ...

    def log_step(self, step: int, groups: Groups, stats: Stats) -> None: ...

    def log_eval(self, step: int, groups: Groups, scores: Stats) -> None: ...

    def log_commit(self, step: int, size: int) -> None:
        """The newest checkpoint is that of `step` and has `size` bytes."""
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
