"""The controller's Protocols, fulfilled by actors: who is called, in which order, and how long we wait."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ray

from grpo.checkpoint import Commit
from grpo.cluster.fleet import Fleet, RecoveryBudget, Slot, State
from grpo.cluster.session import Session
from grpo.cluster.waiting import ActorHandle, Call
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, NoNode, StoreLost, TrainerLost
from grpo.interfaces import Observer
from grpo.run.faults import fault_point
from grpo.types import FileRecord, Group, Prompt, Sample, Sampling, Stats


class RayTrainer:
    """The ranks of the policy, always called together. One that is lost takes the others along."""

    def __init__(
        self,
        session: Session,
        config: Config,
        create: Callable[[int], ActorHandle],
        recoveries: RecoveryBudget,
        observer: Observer,
    ) -> None:
        self.session, self.config, self.create = session, config, create
        self.recoveries, self.observer = recoveries, observer
        self.lost: TrainerLost | None = None
        self.launch()

    def launch(self) -> None:
        """New ranks, which start beside everything else that starts; `ready` waits for them."""
        self._at(0)
        self.moved = False  # since its weights were last sent
        self.connected = False  # to the engines; see RayWeights
        self.ranks = [self.create(rank) for rank in range(self.config.train.ranks)]
        host, port = self.all([self.ranks[0].call("address")], self.config.deadlines.start, "start", heartbeat="")[0]
        self.observer.workers("trainer", 0, len(self.ranks) if self.lost else 0)  # the first has a place
        self.starting = [rank.call("start", host, port) for rank in self.ranks]

    def ready(self) -> None:
        if self.starting:
            places = self.all(self.starting, self.config.deadlines.start, "start", heartbeat="")
            for rank, place in zip(self.ranks, places, strict=True):
                self.session.started(rank, place)
            self.starting = []
            self.lost = None
            self.observer.workers("trainer", len(self.ranks), 0)

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
        self._at(step)
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
        self._at(commit.step)

    @property
    def leaving(self) -> bool:
        return bool(self.session.leaving(self.ranks))

    def leave(self) -> NoReturn:
        lost = TrainerLost("trainer ranks move: the node of one is about to go away", counts=False)
        self.end(lost)
        raise lost

    def all(self, calls: Sequence[Call], seconds: float, what: str, **options: Any) -> list[Any]:
        """Results of all ranks. Raises TrainerLost once the others are ended too: they may wait for the lost one.

        A rank that fails counts as lost: mostly because another one died, which breaks a collective before Ray tells.
        """
        try:
            return self.session.get(calls, seconds, what, **options)
        except ClusterError as error:
            if isinstance(error, StoreLost | NoNode) or self.session.headless:
                raise
            lost = error if isinstance(error, TrainerLost) else TrainerLost(f"{what}: a trainer rank failed: {error}")
            self.end(lost)
            raise lost from None

    def end(self, lost: TrainerLost) -> None:
        self.lost = lost
        for rank in self.ranks:
            self.session.discard(rank, lost, False)
        self.observer.workers("trainer", 0, len(self.ranks))

    def _at(self, step: int) -> None:
        self.version = step
        self.observer.policy_version("trainer", step)


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
            if len(groups) < len(requests) and (newer := self.ensure()) != version:  # all were lost; new ones are newer
                version, groups = newer, {}
        return [groups[place] for place in range(len(requests))]

    def _share_out(
        self, places: Sequence[int], requests: Sequence[tuple[Prompt, int]], sampling: Sampling, step: int
    ) -> dict[int, Group]:
        """The groups of those places whose engine has answered."""
        slots = self.fleet.of(State.HEALTHY)
        shares = [places[index :: len(slots)] for index in range(len(slots))]
        calls = [
            slot.handle.call("generate", [requests[place] for place in share], sampling)
            for slot, share in zip(slots, shares, strict=True)
        ]
        fault_point("generate.dispatched", step)
        groups: dict[int, Group] = {}
        lost: dict[Slot, ClusterError] = {}
        results = self.session.outcomes(calls, self.config.deadlines.rollout, "rollout", heartbeat="health")
        for slot, share, result in zip(slots, shares, results, strict=True):
            if isinstance(result, EngineLost):
                lost[slot] = result
            elif isinstance(result, GrpoError):
                raise result
            else:
                groups |= zip(share, result, strict=True)
        self.fleet.lose(lost)
        return groups


def request_seed(run_seed: int, step: int, place: int, prompt_id: str) -> int:
    """Seed of a prompt's first sample: the same for the same run, step, place in it and prompt, whoever answers.

    A small data set can bring one prompt twice into a step; its place keeps the samples apart.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{place}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**31 - 2**16)
