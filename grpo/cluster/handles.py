"""Workers that are Ray actors: real methods in the place of verbs as strings, each a call of the actor's own method."""

import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from grpo.cluster import processes
from grpo.cluster.actor_protocols import EngineActor, RankActor
from grpo.cluster.nodes import has_place, node_is_lost
from grpo.errors import GrpoError
from grpo.interfaces import Call, Place, Transfer
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord

HEALTH, TRANSFER, STORE = "health", "transfer", "store"
BESIDE_TRAINING = {HEALTH: 1, TRANSFER: 1, STORE: 1}
"""Threads that a trainer rank has beside the one that its other verbs block, by concurrency group."""
P = ParamSpec("P")
R = TypeVar("R")
RankVerb = Callable[Concatenate[RankActor, P], R]
EngineVerb = Callable[Concatenate[EngineActor, P], Coroutine[object, object, R]]


class RayWorker:
    """A placed actor: it knows its role, what it needed of a node and, once it has told, where it runs."""

    NAMES = {"rollout": "engine", "trainer": "trainer rank"}

    def __init__(self, actor: ActorHandle[Any], role: str, index: int, needs: str = "") -> None:
        self.actor, self.role, self.index, self.needs = actor, role, index, needs
        self.node_id = ""
        self.pids: list[int] = []
        self.lost: GrpoError | None = None

    def __str__(self) -> str:
        return f"{self.NAMES[self.role]} {self.index}"

    def _begin(self, name: str, *args: object, **options: object) -> Any:
        """The future of a method of the actor."""
        method = getattr(self.actor, name)
        return (method.options(**options) if options else method).remote(*args).future()

    def close(self) -> Call[None]:
        """Asks it to end in order."""
        return Call(self, self._begin("close"))

    def ping(self, seconds: float) -> Call[object]:
        """An engine's verbs are coroutines; a rank has a thread for this."""
        return Call(self, self._begin("ping", seconds))

    def end(self) -> None:
        """Kills the actor, and its processes: it leaves children, and a frozen process does not hear Ray."""
        with contextlib.suppress(RayError):  # it may be gone already
            ray.kill(self.actor)
        if self.pids:
            processes.on_node(self.node_id, processes.end, self.pids)

    def stacks(self) -> str:
        """The Python stacks of its processes."""
        return processes.on_node(self.node_id, processes.stacks, self.pids) or "its node is gone"

    def wanted_node(self) -> str:
        """What it reserves, until Ray has found a node."""
        return "" if has_place(self.actor) else self.needs

    def node_is_lost(self) -> bool:
        """Whether the node that Ray chose is gone."""
        return node_is_lost(self.actor)


class RayEngine(RayWorker):
    """An `Engine` in an actor of its own; `receivers` is its number of GPU workers, `lane` as in `Engine`."""

    def __init__(self, actor: ActorHandle[Any], index: int, needs: str = "", receivers: int = 1, lane: int = 0) -> None:
        super().__init__(actor, "rollout", index, needs)
        self.receivers, self.lane = receivers, lane

    def _call(self, verb: EngineVerb[P, R], *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        assert not kwargs
        return Call(self, self._begin(verb.__name__, *args))

    def start(self) -> Call[Place]:
        """Builds the engine."""
        return self._call(EngineActor.start)

    def health(self, seconds: float) -> Call[object]:
        """A token, or word that it is busy."""
        return self._call(EngineActor.health, seconds)

    def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> Call[list[Group]]:
        """G samples of each prompt."""
        return self._call(EngineActor.generate, requests, sampling)

    def abandon(self) -> Call[None]:
        """Drops all that it samples."""
        return self._call(EngineActor.abandon)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        """Logprobs of tokens 1..T-1."""
        return self._call(EngineActor.prompt_logprobs, token_ids)

    def join_transfer(self, transfer: Transfer, place: int) -> Call[None]:
        """Joins as the receivers from `place` on."""
        return self._call(EngineActor.join_transfer, transfer, place)

    def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        """Takes what is sent."""
        return self._call(EngineActor.receive_weights, version, records, ahead)

    def commit_weights(self, version: int, in_flight: bool = False) -> Call[float]:
        """Stamps the version from now on."""
        return self._call(EngineActor.commit_weights, version, in_flight)

    def rest(self) -> Call[None]:
        """Gives its GPU memory away."""
        return self._call(EngineActor.rest)


class SharedBatch(list[Sample]):
    """A batch that goes to several ranks: it lies in Ray's object store once, as long as this list is there."""

    reference: Any = None

    def put(self) -> Any:
        """Its reference, in whose place Ray puts the value."""
        if self.reference is None:
            self.reference = ray.put(list(self))
        return self.reference


class RayRank(RayWorker):
    """A `TrainerRank` in an actor of its own."""

    def __init__(self, actor: ActorHandle[Any], index: int, needs: str = "") -> None:
        super().__init__(actor, "trainer", index, needs)

    def _call(self, verb: RankVerb[P, R], *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        assert not kwargs
        return Call(self, self._begin(verb.__name__, *args))

    def ping(self, seconds: float) -> Call[object]:
        """From the thread beside the one that trains."""
        return Call(self, self._begin("ping", seconds, concurrency_group=HEALTH))

    def address(self) -> Call[tuple[str, int]]:
        """Host and free port."""
        return self._call(RankActor.address)

    def start(self, host: str, port: int) -> Call[Place]:
        """Builds the rank together with the others."""
        return self._call(RankActor.start, host, port)

    def step(self, batch: Sequence[Sample], step: int) -> Call[Stats]:
        """All updates of a step."""
        return self._call(RankActor.step, batch.put() if isinstance(batch, SharedBatch) else batch, step)

    def evaluate(self, batch: Sequence[Sample]) -> Call[Stats]:
        """The loss of these rows."""
        return self._call(RankActor.evaluate, batch.put() if isinstance(batch, SharedBatch) else batch)

    def save(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        """Writes its share."""
        return self._call(RankActor.save, folder, step)

    def load(self, folder: str, names: Sequence[str], step: int) -> Call[tuple[str, ...]]:
        """Reads what was saved."""
        return self._call(RankActor.load, folder, names, step)

    def snapshot(self, step: int) -> Call[None]:
        """Copies its share of the state."""
        return self._call(RankActor.snapshot, step)

    def write(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        """From a thread beside the one that trains."""
        return Call(self, self._begin("write", folder, step, concurrency_group=STORE))

    def try_saving(self, folder: str) -> Call[None]:
        """Writes what can be refused of a policy."""
        return self._call(RankActor.try_saving, folder)

    def records(self) -> Call[tuple[TensorRecord, ...]]:
        """What will be sent."""
        return self._call(RankActor.records)

    def tolerance(self) -> Call[float]:
        """What rounding may do to an engine's logprobs."""
        return self._call(RankActor.tolerance)

    def offer_transfers(self, lanes: int, near: bool) -> Call[tuple[str, ...]]:
        """Where engines may meet it."""
        return self._call(RankActor.offer_transfers, lanes, near)

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> Call[None]:
        """Joins as the sender."""
        return self._call(RankActor.open_transfers, transfers)

    def send_weights(self, version: int) -> Call[Manifest | None]:
        """Sends every tensor."""
        return self._call(RankActor.send_weights, version)

    def publish(self, version: int, oldest: int) -> Call[float]:
        """Keeps a copy of the weights."""
        return self._call(RankActor.publish, version, oldest)

    def send_published(self, version: int) -> Call[Manifest]:
        """From a thread beside the one that trains."""
        return Call(self, self._begin("send_published", version, concurrency_group=TRANSFER))

    def perturb(self, scale: float, seed: int) -> Call[None]:
        """Adds noise."""
        return self._call(RankActor.perturb, scale, seed)

    def restore(self) -> Call[None]:
        """Takes the noise away."""
        return self._call(RankActor.restore)

    def logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        """Logprobs of tokens 1..T-1."""
        return self._call(RankActor.logprobs, token_ids)
