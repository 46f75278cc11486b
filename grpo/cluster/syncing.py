"""Weight syncs between workers: who sends, who receives, and what a loss in the middle of one means."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from grpo.cluster.context import RunContext
from grpo.cluster.fleet import Fleet, Slot, State
from grpo.cluster.heartbeat import process_lives
from grpo.cluster.rollouts import engine_lives
from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import ClusterError, EngineLost, GrpoError, Interrupted, MemoryNotShared, TrainerLost
from grpo.interfaces import Call, Engine, TrainerRank, Transfer
from grpo.run.faults import fault_point
from grpo.types import Manifest, Stats, TensorRecord
from grpo.weights import check_adapter_sent, check_self_test, verify

SURELY_CHANGED = 1_000_000  # weights of which some change their bits in any update
PERTURBATION = 0.2  # of each tensor's root mean square: far above what precision can explain


def worker_lives(worker: Any, seconds: float) -> Call[object]:
    """Asks a rank's process; of an engine more, whose core may be frozen in the middle of a transfer."""
    return engine_lives(worker, seconds) if worker.role == "rollout" else process_lives(worker, seconds)


def surely_changed(announced: Sequence[TensorRecord]) -> bool:
    """Whether an update changes some bits for sure: a small model in bfloat16 may round a whole step away.

    Only what training moves counts, below an adapter the matrices that it changes.
    """
    return sum(record.numel for record in announced if record.moves) >= SURELY_CHANGED


class WeightSync:
    """Weights from trainer rank 0 to every engine: sent, received, compared, and only then stamped.

    Whenever an engine or the trainer is new, a new transfer is opened and all must pass the self-test.
    """

    ahead = in_flight = False
    """How engines take weights, also in the self-test: it proves the way that is used."""

    def __init__(
        self, context: RunContext, fleet: Fleet, trainer: TrainerGroup, self_test_prompt: Sequence[int]
    ) -> None:
        self.context, self.fleet, self.trainer = context, fleet, trainer
        self.self_test_prompt = list(self_test_prompt)
        self.version = -1
        self.self_tested: Stats = {}
        self.parts: Stats = {}
        """Seconds of the last sync, by part: those that all ends took together, and each part of the slowest end."""
        self.digest = ""
        self.digests: dict[int, str] = {}
        self.last: Manifest | None = None
        self.connected: list[Engine] = []  # engines of the transfer
        self.unshared = ""  # the node on which engines could not read the trainer's memory
        self.among: list[Slot] | None = None  # the only ones that a sync is with

    def begin(self, version: int) -> Stats:
        """At the start and after a loss of the trainer."""
        return self.publish(version)

    def publish(self, version: int) -> Stats:
        """Until all engines that are there have the weights; those that are lost meanwhile are started again."""
        began = time.perf_counter()
        self.trainer.ready()
        sent = self._bring(version)
        return {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(record.nbytes for record in sent.records)),
            **self.parts,
            **self.self_tested,
        }

    def hold(self, version: int) -> None:
        """Engines have what was published last."""
        assert version == self.version, f"version {version} is not held, but {self.version}"

    def _bring(self, version: int) -> Manifest:
        self.self_tested = {}
        while True:
            # A step that was trained is over only with its weights: those that all have to leave take these before.
            self.fleet.gather(wait=not self._slots(), last=False)
            self._drop_dead()
            if not self._slots():  # all that were there are dead, or had to leave their nodes
                continue
            self._try_joining()
            try:
                if self._engines() != self.connected or not self.trainer.connected:
                    self.self_tested = self._connect()
                sent = self._deliver(version)
                self._commit(version)
                break
            except EngineLost:
                continue
        self._taken(version)
        return sent

    def _drop_dead(self) -> None:
        """Engines that died while nobody asked them anything: in the sync they would take the others along."""
        engines, seconds = self._engines(), self.context.config.deadlines.health
        calls = [engine.ping(seconds) for engine in engines]
        results = self.context.workers.outcomes(calls, seconds, "weight sync", ask=None, finish_first=True)
        found = zip(engines, results, strict=True)
        self.fleet.failed({engine: result for engine, result in found if isinstance(result, ClusterError)})

    def _try_joining(self) -> None:
        """Engines that are not needed pass the whole test by themselves first: what they fail in harms no other."""
        if not (joining := self.fleet.joining):
            return
        self.trainer.connected = False
        self.among = joining
        try:
            self._connect()
        except GrpoError as error:
            if isinstance(error, TrainerLost | Interrupted) or self.context.workers.headless:
                raise
            self.fleet.refuse(joining, error)
        finally:
            self.among = None
            self.self_tested = {}

    def _taken(self, version: int) -> None:
        """All engines sample from a version that was verified."""
        self.fleet.verified()
        self.version, self.digests[version] = version, self.digest
        self.context.observer.policy_version("rollout", version, self.digest)
        fault_point("sync.done", version)

    def ensure(self) -> int:
        """The version that engines sample from; where none is healthy, once new ones have the trainer's weights."""
        self.fleet.retire()
        if not self.fleet.of(State.HEALTHY):
            self.publish(self.trainer.version)
        return self.version

    def _connect(self) -> Stats:
        """A transfer from rank 0, the sender, to the engines' receivers; then the self-test."""
        observer, began = self.context.observer, time.perf_counter()
        observer.starting("connect")
        sender, engines = self.trainer.ranks[0], self._engines()
        announced, allowed = sender.records(), sender.tolerance()
        self._exchange([announced, allowed])
        self.records, self.tolerance = announced.result, allowed.result
        self._join(sender, engines)
        self.last = None
        observer.starting("self_test")
        connected = time.perf_counter()
        difference = self._self_test()
        tested = time.perf_counter()
        observer.starting("sync")
        self.trainer.connected = True
        self.connected = self._engines()
        seconds = {"sync/connect_seconds": connected - began, "sync/self_test_seconds": tested - connected}
        return {"sync/self_test_diff": difference, **seconds}

    def _join(self, sender: TrainerRank, engines: Sequence[Engine]) -> None:
        """Through the sender's GPU memory where all are on its node and can read it, else through the network."""
        near = {engine.node_id for engine in engines} == {sender.node_id} - {"", self.unshared}
        try:
            self._meet(sender, engines, near)
        except MemoryNotShared as error:
            if not near or self.context.config.sync.transport != "auto":
                raise
            if self.among is None:
                self.unshared = sender.node_id
            self.context.workers.say(f"note: weights go by NCCL, since {error}")
            self._meet(sender, engines, near=False)

    def _meet(self, sender: TrainerRank, engines: Sequence[Engine], near: bool) -> None:
        """In a transfer for the engines of each lane, or in one for all, as the sender offers."""
        lanes = sorted({engine.lane for engine in engines})
        offered = sender.offer_transfers(len(lanes), near)
        self._exchange([offered])
        members = [[engine for engine in engines if engine.lane == lane] for lane in lanes]
        members = members if len(offered.result) > 1 else [list(engines)]
        sizes = [1 + sum(engine.receivers for engine in group) for group in members]
        urls = zip(offered.result, sizes, strict=True)
        transfers = tuple(Transfer(url, size, secrets.token_hex(32)) for url, size in urls)
        joins = [sender.open_transfers(transfers)]
        for transfer, group in zip(transfers, members, strict=True):
            place = 1
            for engine in group:
                joins.append(engine.join_transfer(transfer, place))
                place += engine.receivers
        self._exchange(joins)

    def _self_test(self) -> float:
        """Engines must follow the trainer to perturbed weights and back; see `weights/self_test.py`."""
        ranks = self.trainer.ranks
        self._exchange([rank.perturb(PERTURBATION, self.context.config.run.seed) for rank in ranks])
        try:
            perturbed, sent = self._compare(), self.last
        except GrpoError as error:
            if not isinstance(error, TrainerLost | Interrupted) and not self.context.workers.headless:
                self._exchange([rank.restore() for rank in ranks])
            raise
        self._exchange([rank.restore() for rank in ranks])
        true = self._compare()
        assert sent and self.last, "both were sent"
        check_adapter_sent(sent, self.last, self.records)
        return check_self_test(perturbed, true, self.tolerance, [str(engine) for engine in self._engines()])

    def _compare(self) -> tuple[list[float], list[list[float]]]:
        """Logprobs of the self-test's prompt after a sync: the trainer's, and each engine's."""
        self._send(version=0)
        self._commit(0, self.in_flight)
        trained = [rank.logprobs(self.self_test_prompt) for rank in self.trainer.ranks]
        sampled = [engine.prompt_logprobs(self.self_test_prompt) for engine in self._engines()]
        self._exchange([*trained, *sampled])
        return trained[0].result, [call.result for call in sampled]

    def _deliver(self, version: int) -> Manifest:
        """What `_bring` sends: the live weights."""
        return self._send(version)

    def _send(self, version: int) -> Manifest:
        """The live weights, verified but not committed."""
        began = time.perf_counter()
        sends = [rank.send_weights(version) for rank in self.trainer.ranks]
        receipts = self._receipts(version)
        self._exchange([*sends, *receipts])
        self.parts = {"sync/exchange_seconds": time.perf_counter() - began}
        moved, self.trainer.moved = self.trainer.moved, False
        return self._verify(version, sends[0], receipts, moved)

    def _receipts(self, version: int) -> list[Call[list[Manifest]]]:
        """Every engine takes what is on its way."""
        receipts = [engine.receive_weights(version, self.records, self.ahead) for engine in self._engines()]
        fault_point("sync.dispatched", version)
        return receipts

    def _verify(
        self, version: int, send: Call[Manifest | None], receipts: Sequence[Call[list[Manifest]]], moved: bool
    ) -> Manifest:
        """Compares what was sent with what all have received; `moved`: it must be other than what was sent before."""
        began, sent = time.perf_counter(), send.result
        assert sent is not None, "rank 0 is the sender"
        updated = moved and surely_changed(self.records)
        received = [manifest for call in receipts for manifest in call.result]
        verify(sent, received, previous=self.last, updated=updated)
        self.digest = hashlib.sha256("".join(record.digest for record in sent.records).encode()).hexdigest()[:16]
        self.last = sent
        self.parts |= {f"sync/send_{part}_seconds": seconds for part, seconds in sent.seconds.items()}
        for part in {part: 0 for manifest in received for part in manifest.seconds}:
            slowest = max(manifest.seconds.get(part, 0.0) for manifest in received)
            self.parts[f"sync/receive_{part}_seconds"] = slowest
        self.parts["sync/verify_seconds"] = time.perf_counter() - began
        fault_point("sync.received", version)
        return sent

    def _commit(self, version: int, in_flight: bool = False) -> None:
        began = time.perf_counter()
        self._exchange([engine.commit_weights(version, in_flight) for engine in self._engines()])
        self.parts["sync/commit_seconds"] = time.perf_counter() - began

    def _slots(self) -> list[Slot]:
        serving = self.fleet.serving
        return serving if self.among is None else [slot for slot in serving if slot in self.among]

    def _engines(self) -> list[Engine]:
        return [slot.engine for slot in self._slots()]

    def _exchange(self, calls: Sequence[Call[object]]) -> None:
        """Waits for the calls of one phase of a sync; each has a result then.

        Whoever is lost breaks the phase off for the others too: an engine that failed in it is lost as well. Raises
        TrainerLost; EngineLost when new engines are on their way; any other error as it is.
        """
        deadlines = self.context.config.deadlines
        # The ends of a transfer know deadlines.sync too, and which end was late.
        seconds = deadlines.sync + deadlines.health
        results = self.context.workers.outcomes(calls, seconds, "weight sync", worker_lives, finish_first=True)
        self.context.observer.alive()
        ended = zip((call.worker for call in calls), results, strict=True)
        errors = {worker: result for worker, result in ended if isinstance(result, GrpoError)}
        losses = {worker: error for worker, error in errors.items() if isinstance(error, ClusterError)}
        trainer = [error for error in errors.values() if isinstance(error, TrainerLost)]
        broken = [slot for slot in self._slots() if slot.engine in losses]
        other = [error for error in errors.values() if not isinstance(error, ClusterError)]
        if other:
            raise other[0]
        if trainer:
            self.trainer.noticed(trainer[0], [call.worker for call in calls])
        if broken:
            self.trainer.connected = False
            cause = next((losses[slot.engine] for slot in broken if slot.engine.lost), losses[broken[0].engine])
            self.fleet.lose(dict.fromkeys(broken, cause))
        for error in errors.values():
            raise trainer[0] if trainer else EngineLost(str(error)) if broken else error
