"""Runs of `grpo train` one after the other on one Ray, one engine and one rank: a small run is half start, paid once.

A run is what it is by itself, to the last bit. The engine takes the next one's weights as it takes those of a trainer
that was replaced: a new transfer, a self-test, all tensors, another salt of its prefix cache. The rank keeps its
process, what that has imported and its process group, and builds everything else anew.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any
from unittest.mock import patch

import ray

from grpo.cli.arguments import leave_shell
from grpo.cluster import job
from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.handles import RayEngine, RayRank
from grpo.cluster.session import Session
from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.interfaces import Place
from grpo.plan.placement import ROLES, Role
from grpo.run.start import Phases
from grpo.run.stopping import StopRequest


class KeptEngineActor(VLLMActor):
    """It starts once."""

    place: Place | None = None

    async def start(self) -> Place:
        """Where it runs."""
        if self.place is None:
            self.place = await super().start()
        return self.place


class RenewedRankActor(PolicyModelActor):
    """It starts once for each run."""

    def renew(self, config: Config) -> None:
        """From the next start on it is a rank of this run."""
        self.config, self.phases = config, Phases("process")

    def start(self, host: str, port: int) -> Place:
        """A trainer with weights and optimizer of its own."""
        if hasattr(self, "trainer"):
            from grpo.trainer import policy_trainer

            module: Any = policy_trainer
            module.load_deepspeed = module.start_process_group = lambda *_: None  # they hold for the process
            del self.trainer
            gc.collect()
        return super().start(host, port)


class OneStack:
    """`with OneStack() as stack: stack.train(config)`, for configurations whose model and rollout are equal."""

    def __init__(self) -> None:
        self.cluster: Session | None = None
        self.engine: RayEngine | None = None
        self.rank: RayRank | None = None
        self.first: Config | None = None

    def __enter__(self) -> "OneStack":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self.cluster is not None:
            self.cluster.stop(failed=kind is not None)

    def train(self, config: Config) -> None:
        """As `grpo train`. Raises GrpoError, after which the stack serves no further run; ValueError."""
        first = self.first = self.first or config
        if (config.model, config.rollout, config.cluster) != (first.model, first.rollout, first.cluster):
            raise ValueError("runs of one stack share model, rollout and cluster, as they share the engine")
        if config.rollout.most_engines != 1 or config.train.ranks != 1:
            raise ValueError(
                f"a stack has one engine and one rank, not {config.rollout.engines} and {config.train.ranks}"
            )
        leave_shell(config)
        with patch.object(job, "session", self._session):
            job.train(config, job.Makers(self._engine, self._rank))

    @contextlib.contextmanager
    def _session(
        self, config: Config, stop: StopRequest, say: Callable[[str], None] = print, roles: Sequence[Role] = ROLES
    ) -> Iterator[Session]:
        if self.cluster is None:
            self.cluster = Session(config, stop, say, roles)
            self.cluster.start()
        else:
            assert self.cluster.head is not None
            self.cluster.workers = Workers(config, stop, self.cluster.head, say)
            self.cluster.workers.device = self.cluster.device
        stop.listen()
        yield self.cluster

    def _engine(self, cluster: Session, config: Config, index: int) -> RayEngine:
        if self.engine is None:
            made = job.placed_engine(cluster, config, index, KeptEngineActor)
            assert isinstance(made, RayEngine)
            self.engine = made
        return RayEngine(self.engine.actor, index, self.engine.needs)  # what the run before has noted of it is gone

    def _rank(self, cluster: Session, config: Config, index: int) -> RayRank:
        if self.rank is None:
            self.rank = job.placed_rank(cluster, config, index, RenewedRankActor)
        ray.get(self.rank.actor.renew.remote(config))
        return RayRank(self.rank.actor, index, self.rank.needs)
