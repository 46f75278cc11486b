"""The controller's Protocols, fulfilled by actors: who is called, in which order, and how long we wait."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from grpo.checkpoint import Commit
from grpo.cluster.fleet import Fleet, Recoveries, Slot, State
from grpo.cluster.session import Session
from grpo.cluster.waiting import Call, Member
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, StoreLost, TrainerLost
from grpo.faults import fault_point
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats
from grpo.weights import check_self_test, verify

SURELY_CHANGED = 1_000_000  # weights of which some change their bits in any update
PERTURBATION = 0.2  # of each tensor's root mean square: far above what precision can explain


class RayTrainer:
    """The ranks of the policy, always called together. One that is lost takes the others along."""

    def __init__(
        self, session: Session, config: Config, create: Callable[[int], Member], recoveries: Recoveries
    ) -> None:
        self.session, self.config, self.create, self.recoveries = session, config, create, recoveries
        self.lost: GrpoError | None = None
        self.launch()

    def launch(self) -> None:
        """New ranks, which start beside everything else that starts; `ready` waits for them."""
        self.version = 0
        self.moved = False  # since its weights were last sent
        self.connected = False  # to the engines; see RayWeights
        self.ranks = [self.create(rank) for rank in range(self.config.train.ranks)]
        host, port = self.all([self.ranks[0].call("address")], self.config.deadlines.start, "start", pulse="")[0]
        self.starting = [rank.call("start", host, port) for rank in self.ranks]

    def ready(self) -> None:
        if self.starting:
            places = self.all(self.starting, self.config.deadlines.start, "start", pulse="")
            for rank, place in zip(self.ranks, places, strict=True):
                self.session.started(rank, place)
            self.starting = []

    def rebuild(self) -> None:
        assert self.lost is not None, "only a lost trainer is rebuilt"
        self.recoveries.spend(self.lost)
        self.launch()
        self.ready()

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        shared = ray.put(list(batch))
        calls = [rank.call("step", shared, step) for rank in self.ranks]
        fault_point("train.dispatched", step)
        stats: Stats = self.all(calls, self.config.deadlines.train, "train", finish_first=True)[0]
        self.version = step
        self.moved |= stats.get("train/grad_norm", 0.0) * stats.get("train/learning_rate", 0.0) > 0
        return stats

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        calls = [rank.call("save", folder, step) for rank in self.ranks]
        records = self.all(calls, self.config.deadlines.save, "save", finish_first=True)
        self.recoveries.reset()
        return tuple(record for share in records for record in share)

    def load(self, commit: Commit) -> None:
        self.ready()
        names = [file.name for file in commit.files]
        calls = [rank.call("load", commit.folder, names, commit.step) for rank in self.ranks]
        self.all(calls, self.config.deadlines.save, "load")
        self.version = commit.step

    def all(self, calls: Sequence[Call], seconds: float, what: str, **options: Any) -> list[Any]:
        """Results of all ranks. Raises TrainerLost once the others are ended too: they may wait for the lost one.

        A rank that fails counts as lost: mostly because another one died, which breaks a collective before Ray tells.
        """
        try:
            return self.session.get(calls, seconds, what, **options)
        except ClusterError as error:
            if isinstance(error, StoreLost) or self.session.headless:
                raise
            lost = error if isinstance(error, TrainerLost) else TrainerLost(f"{what}: a trainer rank failed: {error}")
            self.end(lost)
            raise lost from None

    def end(self, lost: TrainerLost) -> None:
        self.lost = lost
        for rank in self.ranks:
            self.session.discard(rank, lost, False)


class RayWeights:
    """Weights from trainer rank 0 to every engine: sent, received, compared, and only then stamped.

    Whenever an engine or the trainer is new, a new transfer group is formed and all must pass the self-test.
    """

    def __init__(
        self, session: Session, config: Config, fleet: Fleet, trainer: RayTrainer, canary: Sequence[int]
    ) -> None:
        self.session, self.config, self.fleet, self.trainer = session, config, fleet, trainer
        self.canary = list(canary)
        self.version = -1
        self.digest = ""
        self.last: Manifest | None = None

    def sync(self, version: int) -> Stats:
        """Until all engines that are there have the weights; those that are lost meanwhile are started again."""
        began = time.perf_counter()
        self.trainer.ready()
        while True:
            self.fleet.gather(wait=not self.fleet.of(State.HEALTHY) or not self.trainer.connected)
            try:
                stats = self._connect() if self.fleet.of(State.STALE) or not self.trainer.connected else {}
                sent = self._send(version)
                self._call("commit_weights", version)
                break
            except EngineLost:
                continue
        self.fleet.verified()
        self.version = version
        fault_point("sync.done", version)
        return stats | {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(record.nbytes for record in sent.records)),
        }

    def ensure(self) -> int:
        """The version that engines sample from; where none is healthy, once new ones have the trainer's weights."""
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
            calls.append(slot.member.call("join_transfer", host, port, 1 + place * workers, world_size))
        self._exchange(calls)
        self.last = None
        difference = self._self_test()
        self.trainer.connected = True
        return {"sync/self_test_diff": difference}

    def _self_test(self) -> float:
        """Engines must follow the trainer to perturbed weights and back; see `weights/selftest.py`."""
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
        """Logprobs of the canary prompt after a sync: the trainer's, and each engine's."""
        self._send(version=0)
        self._call("commit_weights", 0)
        calls = [rank.call("logprobs", self.canary) for rank in self.trainer.ranks]
        calls += [slot.member.call("prompt_logprobs", self.canary) for slot in self._slots()]
        results = self._exchange(calls)
        return results[0], results[len(self.trainer.ranks) :]

    def _send(self, version: int) -> Manifest:
        """One version of the weights, verified but not committed."""
        ranks = self.trainer.ranks
        calls = [rank.call("send_weights", version) for rank in ranks]
        calls += [slot.member.call("receive_weights", version, self.records) for slot in self._slots()]
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
        self._exchange([slot.member.call(verb, *args) for slot in self._slots()])

    def _exchange(self, calls: Sequence[Call]) -> list[Any]:
        """Results of calls of one phase of a sync.

        Whoever is lost breaks the phase off for the others too: an engine that failed in it is lost as well. Raises
        TrainerLost; EngineLost when new engines are on their way; any other error as it is.
        """
        deadlines = self.config.deadlines  # the ends of a transfer know deadlines.sync too, and which end was late
        results = self.session.outcomes(calls, deadlines.sync + deadlines.health, "weight sync", finish_first=True)
        errors = {call.member: result for call, result in zip(calls, results, strict=True) if is_error(result)}
        trainer = [error for error in errors.values() if isinstance(error, TrainerLost)]
        broken = [slot for slot in self._slots() if isinstance(errors.get(slot.member), ClusterError)]
        other = [error for error in errors.values() if not isinstance(error, ClusterError)]
        if other:
            raise other[0]
        if trainer:
            self.trainer.end(trainer[0])
        if broken:
            self.trainer.connected = False
            self.fleet.lose(broken, next((errors[s.member] for s in broken if s.member.lost), errors[broken[0].member]))
        for error in errors.values():
            raise trainer[0] if trainer else EngineLost(str(error)) if broken else error
        return results


class RayRollouts:
    """Engines that share each call's prompts evenly; what a lost one has not answered goes to the others."""

    def __init__(self, session: Session, config: Config, fleet: Fleet, ensure: Callable[[], int]) -> None:
        """`ensure` waits for at least one healthy engine and returns the version that engines sample from."""
        self.session, self.config, self.fleet, self.ensure = session, config, fleet, ensure

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        seed = self.config.run.seed
        requests = [(prompt, request_seed(seed, step, place, prompt.id)) for place, prompt in enumerate(prompts)]
        groups: dict[int, Group] = {}
        version = self.ensure()
        while missing := [place for place in range(len(requests)) if place not in groups]:
            groups |= self._share_out(missing, requests, sampling, step)
            if self.ensure() != version:  # all engines were lost, and the new ones hold newer weights
                version, groups = self.ensure(), {}
        return [groups[place] for place in range(len(requests))]

    def _share_out(
        self, places: Sequence[int], requests: Sequence[tuple[Prompt, int]], sampling: Sampling, step: int
    ) -> dict[int, Group]:
        """The groups of those places whose engine has answered."""
        slots = self.fleet.of(State.HEALTHY)
        shares = [places[index :: len(slots)] for index in range(len(slots))]
        calls = [
            slot.member.call("generate", [requests[place] for place in share], sampling)
            for slot, share in zip(slots, shares, strict=True)
        ]
        fault_point("generate.dispatched", step)
        groups: dict[int, Group] = {}
        results = self.session.outcomes(calls, self.config.deadlines.rollout, "rollout", pulse="health")
        for slot, share, result in zip(slots, shares, results, strict=True):
            if isinstance(result, EngineLost):
                self.fleet.lose([slot], result)
            elif isinstance(result, GrpoError):
                raise result
            else:
                groups |= zip(share, result, strict=True)
        return groups


def is_error(result: Any) -> bool:
    return isinstance(result, GrpoError)


def request_seed(run_seed: int, step: int, place: int, prompt_id: str) -> int:
    """Seed of a prompt's first sample: the same for the same run, step, place in it and prompt, whoever answers.

    A small data set can bring one prompt twice into a step; its place keeps the samples apart.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{place}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**31 - 2**16)
