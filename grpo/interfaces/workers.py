"""Who does the work: engines and trainer ranks. Their verbs are methods that begin at once and return a `Call`."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from grpo.errors import GrpoError
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord

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
    oom_kills: int = 0
    """Processes that the kernel had killed there by then for want of memory."""
    seconds: Stats | None = None
    """What its start took, by phase (`run/start.py`); None if it does not say."""
    notes: tuple[str, ...] = ()
    """Lines for a person about its start."""


@dataclass(frozen=True)
class Transfer:
    """Where weights change hands: the sender is place 0 of `size`, each receiver of an engine has a place after it.

    `url` says how they travel: nccl://host:port is a process group that meets there. Only who knows the `secret`, which
    is made for this transfer alone and handed on by Ray, takes part.
    """

    url: str
    size: int
    secret: str = field(repr=False)


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

    def abandon(self) -> Call[None]:
        """Drops all that `generate` is sampling; those calls fail, and nobody waits for them."""
        ...

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        """Logprobs of tokens 1..T-1 at temperature 1, under the weights that were received last."""
        ...


class WeightReceiver(Worker, Protocol):
    """Takes weights: received, compared by the caller, and only then committed."""

    receivers: int
    """Places that it takes in a transfer."""
    lane: int
    """Which transfer it joins by NCCL, which takes a GPU once: engines that share one have lanes of their own."""

    def join_transfer(self, transfer: Transfer, place: int) -> Call[None]:
        """Leaves the transfer before and joins this one; its first receiver has this place."""
        ...

    def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        """Takes the announced tensors; what each receiver took.

        Nothing is sampled until they are committed; `ahead` they lie beside the weights that are sampled from.
        """
        ...

    def commit_weights(self, version: int, in_flight: bool = False) -> Call[float]:
        """From now on it samples from these weights, and says so; the seconds that it stood still for that.

        Forgets what older weights computed, so no request may run; `in_flight` requests go on in the middle of their
        tokens, and new ones find nothing of older weights. 0 also commits `model.path`.
        """
        ...

    def rest(self) -> Call[None]:
        """Gives the GPU memory of its weights and cache back until others are received and committed."""
        ...


class Engine(Sampler, WeightReceiver, Protocol):
    """One rollout engine."""


class TrainerRank(Worker, Protocol):
    """One rank of the policy; every verb but those of the transfer is called on all ranks together.

    `ping`, `send_published` and `write` have threads of their own beside the one of all other verbs.
    """

    def address(self) -> Call[tuple[str, int]]:
        """Host and a free port for the ranks' rendezvous."""
        ...

    def start(self, host: str, port: int) -> Call[Place]:
        """Loads the model and meets the other ranks."""
        ...

    def step(self, batch: Sequence[Sample], step: int) -> Call[Stats]:
        """All updates of a step."""
        ...

    def evaluate(self, batch: Sequence[Sample]) -> Call[Stats]:
        """The loss of these rows; nothing is learned."""
        ...

    def save(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        """Writes its share of the whole state below a folder of the store; what it wrote."""
        ...

    def snapshot(self, step: int) -> Call[None]:
        """Copies its share of the whole state to the host, as it is after that step."""
        ...

    def write(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        """Beside the verbs that train: writes the copy of that step below a folder of the store; what it wrote."""
        ...

    def try_saving(self, folder: str) -> Call[None]:
        """Writes what can be refused of a policy, below a folder of the store; nothing stays there."""
        ...

    def load(self, folder: str, names: Sequence[str], step: int) -> Call[tuple[str, ...]]:
        """Takes over what all ranks of that time have saved; lines for a person."""
        ...

    def records(self) -> Call[tuple[TensorRecord, ...]]:
        """Names, shapes and dtypes of the weights, in the order in which they are sent."""
        ...

    def tolerance(self) -> Call[float]:
        """Mean difference of logprobs, in nats, that an engine with the same weights may have."""
        ...

    def offer_transfers(self, lanes: int, near: bool) -> Call[tuple[str, ...]]:
        """Rank 0: where engines may meet it; the url of a `Transfer` for each lane, or of one for all.

        `near`: all of them are on its node.
        """
        ...

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> Call[None]:
        """Rank 0: joins the transfers that it has offered, as their sender; those before are left."""
        ...

    def send_weights(self, version: int) -> Call[Manifest | None]:
        """Sends every tensor; None on the ranks that only help to gather them."""
        ...

    def publish(self, version: int, oldest: int) -> Call[float]:
        """Rank 0 keeps a copy of the weights as `version` and forgets those below `oldest`; bytes of all its copies."""
        ...

    def send_published(self, version: int) -> Call[Manifest]:
        """Rank 0, beside the verbs that train: sends a version that it has published."""
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
