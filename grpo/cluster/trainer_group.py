"""The ranks of the policy as one trainer: who is called, in which order, and what the loss of one means."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from grpo.checkpoint import Commit
from grpo.checkpoint.commit import checkpoints_url
from grpo.cluster.context import RunContext
from grpo.cluster.handles import SharedBatch
from grpo.cluster.heartbeat import Ask, process_lives
from grpo.errors import ClusterError, NoNode, OutOfMemory, StoreLost, TrainerLost
from grpo.interfaces import Call, Place, TrainerRank, Worker
from grpo.run.faults import fault_point
from grpo.store import open_store
from grpo.types import FileRecord, Sample, Stats

R = TypeVar("R")


class TrainerGroup:
    """The ranks of the policy, always called together. One that is lost takes the others along.

    Who holds `turn` has them to itself.
    """

    def __init__(self, context: RunContext, create: Callable[[int], TrainerRank]) -> None:
        self.context, self.create = context, create
        self.config, self.observer = context.config, context.observer
        self.checkpoints = open_store(checkpoints_url(self.config.checkpoint.dir, Path(self.config.run.dir))).url
        self.lost: TrainerLost | None = None
        self.turn, self._ending = threading.RLock(), threading.RLock()
        self.ended: Sequence[TrainerRank] = ()
        """The ranks that were ended last."""
        self.launch()

    def launch(self) -> None:
        """New ranks, which start beside everything else that starts; `ready` waits for them."""
        self._at(0)
        self.moved = False  # since its weights were last sent
        self.connected = False  # to the engines; see WeightSync
        self.ranks = [self.create(rank) for rank in range(self.config.train.ranks)]
        host, port = self.all([self.ranks[0].address()], self.config.deadlines.start, "start", ask=None)[0]
        self.observer.workers("trainer", 0, len(self.ranks) if self.lost else 0)  # the first has a place
        starts = self.context.workers.starts
        self.starting: list[Call[Place]] = [starts(rank.start(host, port)) for rank in self.ranks]
        # A rank does one after the other, so this waits for no engine.
        self.trying = [rank.try_saving(self.checkpoints) for rank in self.ranks]

    def ready(self) -> None:
        """Returns once all ranks have started and could save the model. Raises TrainerLost, ConfigError."""
        if self.starting:
            places = self.all(self.starting, self.config.deadlines.start, "start", ask=None)
            told: dict[str, Stats] = {}
            for rank, place in zip(self.ranks, places, strict=True):
                told |= self.context.workers.started(rank, place)
            self.starting = []
            self.observer.started("trainer", told)
            self.observer.starting("save")
            self.all(self.trying, self.config.deadlines.save, "save")
            self.lost = None
            self.observer.workers("trainer", len(self.ranks), 0)

    def rebuild(self) -> None:
        """New ranks in the place of lost ones. Raises ClusterError if they are lost too often."""
        with self.turn:
            assert self.lost is not None, "only a lost trainer is rebuilt"
            self.context.recoveries.spend(self.lost)
            self.launch()
            self.ready()

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """All updates of a step; the statistics are the same on all ranks."""
        with self.turn:
            shared = SharedBatch(batch)
            calls = [rank.step(shared, step) for rank in self.ranks]
            fault_point("train.dispatched", step)
            stats = self.all(calls, self.config.deadlines.train, "train", finish_first=True)[0]
            self._at(step)
            self.moved |= stats.get("train/grad_norm", 0.0) * stats.get("train/learning_rate", 0.0) > 0
            return stats

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        """The loss of these rows, which the ranks share out."""
        with self.turn:
            shared = SharedBatch(batch)
            calls = [rank.evaluate(shared) for rank in self.ranks]
            return self.all(calls, self.config.deadlines.train, "evaluate", finish_first=True)[0]

    def publish(self, version: int, oldest: int) -> float:
        """Rank 0 keeps a copy of the weights as `version`, none below `oldest`; bytes of all its copies."""
        with self.turn:
            calls = [rank.publish(version, oldest) for rank in self.ranks]
            return self.all(calls, self.config.deadlines.sync, "publish", finish_first=True)[0]

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Every rank writes its share below `folder`. Who commits watches for a request to stop."""
        with self.turn:
            return self._written([rank.save(folder, step) for rank in self.ranks])

    def snapshot(self, step: int) -> None:
        """Every rank copies its share of the state."""
        with self.turn:
            calls = [rank.snapshot(step) for rank in self.ranks]
            self.all(calls, self.config.deadlines.save, "save", finish_first=True)

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Every rank writes its copy below `folder`, in any thread, while the next steps train."""
        return self._written([rank.write(folder, step) for rank in self.ranks])

    def _written(self, calls: Sequence[Call[tuple[FileRecord, ...]]]) -> tuple[FileRecord, ...]:
        shares = self.all(calls, self.config.deadlines.save, "save", stoppable=False)
        return tuple(record for share in shares for record in share)

    def committed(self) -> None:
        """Losses are counted from here on."""
        self.context.recoveries.reset()

    def load(self, commit: Commit) -> None:
        """Takes over a checkpoint."""
        fault_point("resume.found", commit.step)
        self.ready()
        self.observer.starting("load")
        names = [file.name for file in commit.files]
        calls = [rank.load(commit.folder, names, commit.step) for rank in self.ranks]
        for note in self.all(calls, self.config.deadlines.save, "load")[0]:
            self.context.workers.say(note)
        self._at(commit.step)

    @property
    def leaving(self) -> bool:
        """Whether the node of a rank is about to go away."""
        return bool(self.context.workers.leaving(self.ranks))

    def leave(self) -> NoReturn:
        """Ends the ranks, so that `rebuild` makes them elsewhere. Raises a TrainerLost that does not count."""
        lost = TrainerLost("trainer ranks move: the node of one is about to go away", counts=False)
        self.end(lost)
        raise lost

    def all(
        self,
        calls: Sequence[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
        stoppable: bool = True,
    ) -> list[R]:
        """Results of all ranks. Raises TrainerLost once the others are ended too: they may wait for the lost one.

        A rank whose connection broke counts as lost: mostly because another one died, which breaks a collective before
        Ray tells. So does one that has no room at once where a lost one had it. Any other error would come again.
        """
        try:
            return self.context.workers.get(calls, seconds, what, ask, finish_first, stoppable)
        except (ClusterError, OutOfMemory) as error:
            if isinstance(error, OutOfMemory) and not (what == "start" and self.lost):
                raise
            if isinstance(error, StoreLost | NoNode) or self.context.workers.headless:
                raise
            lost = error if isinstance(error, TrainerLost) else TrainerLost(f"{what}: a trainer rank failed: {error}")
            self.noticed(lost, [call.worker for call in calls])
            raise lost from None

    def noticed(self, lost: TrainerLost, workers: Sequence[Worker]) -> None:
        """Calls of these ranks failed: ends all, unless another thread has, or new ones have taken their places."""
        with self._ending:
            if self.ended is not self.ranks and any(worker in self.ranks for worker in workers):
                self.end(lost)

    def end(self, lost: TrainerLost) -> None:
        """Ends all ranks, since one is lost."""
        self.lost, self.ended = lost, self.ranks
        for rank in self.ranks:
            self.context.workers.discard(rank, lost, False)
        self.observer.workers("trainer", 0, len(self.ranks))

    def _at(self, step: int) -> None:
        self.version = step
        self.observer.policy_version("trainer", step)
