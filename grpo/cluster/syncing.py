"""Weight syncs between actors: who sends, who receives, and what a loss in the middle of one means."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from grpo.cluster.fleet import Fleet, Slot, State
from grpo.cluster.groups import RayTrainer
from grpo.cluster.session import Session
from grpo.cluster.waiting import ActorHandle, Call
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, TrainerLost
from grpo.run.faults import fault_point
from grpo.types import Manifest, Stats
from grpo.weights import check_self_test, verify

SURELY_CHANGED = 1_000_000  # weights of which some change their bits in any update
PERTURBATION = 0.2  # of each tensor's root mean square: far above what precision can explain


class RayWeights:
    """Weights from trainer rank 0 to every engine: sent, received, compared, and only then stamped.

    Whenever an engine or the trainer is new, a new transfer group is formed and all must pass the self-test.
    """

    def __init__(
        self, session: Session, config: Config, fleet: Fleet, trainer: RayTrainer, self_test_prompt: Sequence[int]
    ) -> None:
        self.session, self.config, self.fleet, self.trainer = session, config, fleet, trainer
        self.self_test_prompt = list(self_test_prompt)
        self.version = -1
        self.digest = ""
        self.last: Manifest | None = None
        self.connected: list[ActorHandle] = []  # engines of the transfer group

    def sync(self, version: int) -> Stats:
        """Until all engines that are there have the weights; those that are lost meanwhile are started again."""
        began = time.perf_counter()
        self.trainer.ready()
        while True:
            self.fleet.gather(wait=not self._slots())
            if not self._slots():  # all that were there had to leave their nodes
                continue
            handles = [slot.handle for slot in self._slots()]
            try:
                stats = self._connect() if handles != self.connected or not self.trainer.connected else {}
                sent = self._send(version)
                self._call("commit_weights", version)
                break
            except EngineLost:
                continue
        self.fleet.verified()
        self.version = version
        self.fleet.observer.policy_version("rollout", version)
        fault_point("sync.done", version)
        return stats | {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(record.nbytes for record in sent.records)),
        }

    def ensure(self) -> int:
        """The version that engines sample from; where none is healthy, once new ones have the trainer's weights."""
        self.fleet.retire()
        if not self.fleet.of(State.HEALTHY):
            self.sync(self.trainer.version)
        return self.version

    def _connect(self) -> Stats:
        """One transfer group of rank 0, the sender, and the workers of every engine; then the self-test."""
        ranks = self.trainer.ranks
        self.records = self._exchange([ranks[0].call("records")])[0]
        host, port = self._exchange([ranks[0].call("address")])[0]
        workers = self.config.rollout.tensor_parallel
        world_size = 1 + workers * len(self._slots())
        calls = [ranks[0].call("open_transfer", host, port, world_size)]
        for place, slot in enumerate(self._slots()):
            calls.append(slot.handle.call("join_transfer", host, port, 1 + place * workers, world_size))
        self._exchange(calls)
        self.last = None
        difference = self._self_test()
        self.trainer.connected = True
        self.connected = [slot.handle for slot in self._slots()]
        return {"sync/self_test_diff": difference}

    def _self_test(self) -> float:
        """Engines must follow the trainer to perturbed weights and back; see `weights/self_test.py`."""
        self._on_ranks("perturb", PERTURBATION, self.config.run.seed)
        try:
            perturbed = self._compare()
        except EngineLost:
            self._on_ranks("restore")
            raise
        self._on_ranks("restore")
        true = self._compare()
        return check_self_test(perturbed, true, tolerance=self.config.sync.tolerance)

    def _compare(self) -> tuple[list[float], list[list[float]]]:
        """Logprobs of the self-test's prompt after a sync: the trainer's, and each engine's."""
        self._send(version=0)
        self._call("commit_weights", 0)
        calls = [rank.call("logprobs", self.self_test_prompt) for rank in self.trainer.ranks]
        calls += [slot.handle.call("prompt_logprobs", self.self_test_prompt) for slot in self._slots()]
        results = self._exchange(calls)
        return results[0], results[len(self.trainer.ranks) :]

    def _send(self, version: int) -> Manifest:
        """One version of the weights, verified but not committed."""
        ranks = self.trainer.ranks
        calls = [rank.call("send_weights", version) for rank in ranks]
        calls += [slot.handle.call("receive_weights", version, self.records) for slot in self._slots()]
        fault_point("sync.dispatched", version)
        results = self._exchange(calls)
        sent: Manifest = results[0]
        # A small model in bfloat16 may round a whole step away.
        updated = self.trainer.moved and sum(record.numel for record in sent.records) >= SURELY_CHANGED
        received = [manifest for share in results[len(ranks) :] for manifest in share]
        verify(sent, received, previous=self.last, updated=updated)
        self.trainer.moved = False
        self.digest = hashlib.sha256("".join(record.digest for record in sent.records).encode()).hexdigest()[:16]
        self.last = sent
        fault_point("sync.received", version)
        return sent

    def _slots(self) -> list[Slot]:
        return self.fleet.of(State.STALE, State.HEALTHY)

    def _on_ranks(self, verb: str, *args: object) -> None:
        self._exchange([rank.call(verb, *args) for rank in self.trainer.ranks])

    def _call(self, verb: str, *args: object) -> None:
        self._exchange([slot.handle.call(verb, *args) for slot in self._slots()])

    def _exchange(self, calls: Sequence[Call]) -> list[Any]:
        """Results of calls of one phase of a sync.

        Whoever is lost breaks the phase off for the others too: an engine that failed in it is lost as well. Raises
        TrainerLost; EngineLost when new engines are on their way; any other error as it is.
        """
        deadlines = self.config.deadlines  # the ends of a transfer know deadlines.sync too, and which end was late
        results = self.session.outcomes(calls, deadlines.sync + deadlines.health, "weight sync", finish_first=True)
        self.fleet.observer.alive()
        ended = zip((call.handle for call in calls), results, strict=True)
        errors = {handle: result for handle, result in ended if isinstance(result, GrpoError)}
        losses = {handle: error for handle, error in errors.items() if isinstance(error, ClusterError)}
        trainer = [error for error in errors.values() if isinstance(error, TrainerLost)]
        broken = [slot for slot in self._slots() if slot.handle in losses]
        other = [error for error in errors.values() if not isinstance(error, ClusterError)]
        if other:
            raise other[0]
        if trainer:
            self.trainer.end(trainer[0])
        if broken:
            self.trainer.connected = False
            cause = next((losses[slot.handle] for slot in broken if slot.handle.lost), losses[broken[0].handle])
            self.fleet.lose(dict.fromkeys(broken, cause))
        for error in errors.values():
            raise trainer[0] if trainer else EngineLost(str(error)) if broken else error
        return results
