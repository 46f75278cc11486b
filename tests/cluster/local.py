"""Workers in this process behind the same Protocols: engines and ranks with integers for weights, and what drives them.

Nothing is started, so that every order of losses can be tried. Calls have ended when they return.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from grpo.cluster.context import RecoveryBudget, RunContext
from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.errors import GrpoError
from grpo.interfaces import Call, Place, Transfer
from grpo.run.stopping import StopRequest
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord
from tests.fakes import FakeRecorder, sample

R = TypeVar("R")


@dataclass
class LocalHead:
    """A head that lives; `draining` are nodes that are about to go away."""

    draining: frozenset[str] = frozenset()
    lost: bool = False

    def check(self) -> None:
        pass


@dataclass(eq=False)
class LocalWorker:
    """Tells `events` what it is asked. `fails` maps a verb to the error that its next call ends with."""

    role: str
    index: int
    events: list[str]
    node_id: str = ""
    pids: list[int] = field(default_factory=list)
    lost: GrpoError | None = None
    fails: dict[str, GrpoError] = field(default_factory=dict)
    wants: str = ""
    """What a node must have that it waits for."""

    def __str__(self) -> str:
        return f"{'engine' if self.role == 'rollout' else 'trainer rank'} {self.index}"

    def does(self, verb: str, work: Callable[[], R]) -> Call[R]:
        """A call that has ended."""
        self.events.append(f"{self} {verb}")
        future: Future[R] = Future()
        name = verb.split()[0]
        if name in self.fails:
            future.set_exception(self.fails.pop(name))
            return Call(self, future)
        try:
            future.set_result(work())
        except GrpoError as error:
            future.set_exception(error)
        return Call(self, future)

    def ping(self, seconds: float) -> Call[object]:
        return self.does("ping", lambda: None)

    def close(self) -> Call[None]:
        return self.does("close", lambda: None)

    def end(self) -> None:
        self.events.append(f"{self} ends")

    def stacks(self) -> str:
        return ""

    def wanted_node(self) -> str:
        return self.wants

    def node_is_lost(self) -> bool:
        return False


Wire = dict[str, str]
"""What the sender has put on the way: digests by name."""


class LocalEngine(LocalWorker):
    """Samples that say the version; `drops` is a tensor that it never takes."""

    receivers = 1
    lane = 0

    def __init__(self, index: int, events: list[str], wire: Wire, node_id: str = "") -> None:
        super().__init__("rollout", index, events, node_id)
        self.wire, self.home = wire, node_id
        self.weights: Wire = {}
        self.shadow: Wire = {}
        self.version = -1
        self.drops = ""
        self.resting = False
        self.starting: Future[Place] = Future()

    def start(self) -> Call[Place]:
        if not self.wants:
            return self.does("start", lambda: Place(self.home, []))
        self.events.append(f"{self} waits for a node")
        return Call(self, self.starting)

    def has_started(self, error: GrpoError | None = None) -> None:
        """It has a node at last, and has started there, well or not."""
        self.wants = ""
        if error:
            self.starting.set_exception(error)
        else:
            self.starting.set_result(Place(self.home, []))

    def health(self, seconds: float) -> Call[object]:
        return self.does("health", lambda: "ok")

    def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> Call[list[Group]]:
        def draw() -> list[Group]:
            count = range(sampling.samples_per_prompt)
            return [Group(prompt, tuple(sample(prompt, n, self.version) for n in count)) for prompt, _ in requests]

        return self.does(f"generate {len(requests)}", draw)

    def abandon(self) -> Call[None]:
        return self.does("abandon", lambda: None)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        return self.does("prompt_logprobs", lambda: logprobs(self.weights))

    def join_transfer(self, transfer: Transfer, place: int) -> Call[None]:
        return self.does(f"join_transfer {transfer.url} {place} of {transfer.size}", lambda: None)

    def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        def take() -> list[Manifest]:
            taken = {name: digest for name, digest in self.wire.items() if name != self.drops}
            if ahead:
                self.shadow = taken
            else:
                self.weights, self.shadow = taken, {}
            return [Manifest(version, tuple(record(name, digest) for name, digest in taken.items()))]

        return self.does(f"receive_weights {version}{' ahead' if ahead else ''}", take)

    def commit_weights(self, version: int, in_flight: bool = False) -> Call[float]:
        def switch() -> float:
            self.weights, self.shadow = self.shadow or self.weights, {}
            self.version = version
            self.resting = False
            return 0.0

        return self.does(f"commit_weights {version}{' in flight' if in_flight else ''}", switch)

    def rest(self) -> Call[None]:
        def give_away() -> None:
            self.weights, self.shadow, self.resting = {}, {}, True

        return self.does("rest", give_away)


class LocalRank(LocalWorker):
    """Its weights are digests that move with every step."""

    def __init__(self, index: int, events: list[str], wire: Wire) -> None:
        super().__init__("trainer", index, events)
        self.wire = wire
        self.weights = {"embed": "0", "head": "0"}
        self.published: dict[int, Wire] = {}

    def address(self) -> Call[tuple[str, int]]:
        return self.does("address", lambda: ("host", 1))

    def start(self, host: str, port: int) -> Call[Place]:
        return self.does("start", lambda: Place("", []))

    def step(self, batch: Sequence[Sample], step: int) -> Call[Stats]:
        self.weights = {name: str(step) for name in self.weights}
        return self.does(f"step {step}", lambda: {"train/grad_norm": 1.0, "train/learning_rate": 1.0})

    def save(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        return self.does(f"save {step}", lambda: (FileRecord(f"rank-{self.index}", 0, ""),))

    def snapshot(self, step: int) -> Call[None]:
        return self.does(f"snapshot {step}", lambda: None)

    def write(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        return self.does(f"write {step}", lambda: (FileRecord(f"rank-{self.index}", 0, ""),))

    def load(self, folder: str, names: Sequence[str], step: int) -> Call[tuple[str, ...]]:
        self.weights = {name: str(step) for name in self.weights}
        return self.does(f"load {step}", lambda: ())

    def records(self) -> Call[tuple[TensorRecord, ...]]:
        return self.does("records", lambda: tuple(record(name, "") for name in self.weights))

    def tolerance(self) -> Call[float]:
        return self.does("tolerance", lambda: 0.2)

    def try_saving(self, folder: str) -> Call[None]:
        return self.does("try_saving", lambda: None)

    def offer_transfers(self, lanes: int, near: bool) -> Call[tuple[str, ...]]:
        urls = ["local://here", *(f"local://lane-{lane}" for lane in range(1, 1 if near else lanes))]
        return self.does(f"offer_transfer{' near' if near else ''}", lambda: tuple(urls))

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> Call[None]:
        return self.does(f"open_transfer {' '.join(str(each.size) for each in transfers)}", lambda: None)

    def send_weights(self, version: int) -> Call[Manifest | None]:
        def send() -> Manifest | None:
            return None if self.index else self._send(version, self.weights)

        return self.does(f"send_weights {version}", send)

    def publish(self, version: int, oldest: int) -> Call[float]:
        def keep() -> float:
            self.published = {known: kept for known, kept in self.published.items() if known >= oldest}
            self.published[version] = dict(self.weights)
            return 8.0 * len(self.weights) * len(self.published)

        return self.does(f"publish {version} {oldest}", keep)

    def send_published(self, version: int) -> Call[Manifest]:
        return self.does(f"send_published {version}", lambda: self._send(version, self.published[version]))

    def _send(self, version: int, weights: Wire) -> Manifest:
        self.wire.clear()
        self.wire.update(weights)
        return Manifest(version, tuple(record(name, digest) for name, digest in weights.items()))

    def perturb(self, scale: float, seed: int) -> Call[None]:
        self.weights = {name: f"{digest}~" for name, digest in self.weights.items()}
        return self.does("perturb", lambda: None)

    def restore(self) -> Call[None]:
        self.weights = {name: digest.removesuffix("~") for name, digest in self.weights.items()}
        return self.does("restore", lambda: None)

    def logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        return self.does("logprobs", lambda: logprobs(self.weights))


def record(name: str, digest: str) -> TensorRecord:
    return TensorRecord(name, (2,), "float32", digest)


def logprobs(weights: Wire) -> list[float]:
    """Far apart for perturbed weights, and for those that lack a tensor."""
    return [-9.0 if any("~" in digest for digest in weights.values()) else -1.0, float(-len(weights))]


def make_context(
    run_dir: Path, events: list[str], head: LocalHead | None = None, recoveries: int = 3, **sections: object
) -> RunContext:
    """Waits as in a real run; only the head and the workers are not Ray's."""
    base = {"model": {"path": "unused"}, "run": {"dir": str(run_dir)}, "deadlines": {"health": 4}}
    config = Config.model_validate(base | sections)
    workers = Workers(config, StopRequest(30), head or LocalHead(), lambda text: None)
    return RunContext(config, workers, RecoveryBudget(recoveries), FakeRecorder(events))
