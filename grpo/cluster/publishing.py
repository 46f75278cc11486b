"""Weights of runs that sample ahead: published versions, which engines take beside training.

Publishing is a copy on the trainer; from there on its next update changes nothing that travels. The carrier, a thread,
brings each version into a shadow copy on the engines while they sample, and compares what arrived. Then the engines
switch: `between_batches` when who draws the batches says so (`hold`), `in_flight` at once, in the middle of requests.

An engine that is new goes another way: no request may run, the trainer makes room between two steps, and all prove once
more that they follow it before they get the version that the batch needs.
"""

import threading
import time
from collections.abc import Callable, Sequence

from grpo.cluster.context import RunContext
from grpo.cluster.fleet import Fleet, State
from grpo.cluster.syncing import WeightSync, surely_changed, worker_lives
from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import ClusterError, EngineLost, GrpoError, TrainerLost, WeightSyncError
from grpo.interfaces import Recorder
from grpo.run.background import Cancelled
from grpo.types import Manifest, Stats

SLICE_SECONDS = 0.25


class PublishedWeights(WeightSync):
    """`Weights` for `rollout.max_staleness` above 0."""

    ahead = True

    def __init__(
        self,
        context: RunContext,
        fleet: Fleet,
        trainer: TrainerGroup,
        self_test_prompt: Sequence[int],
        recorder: Recorder,
    ) -> None:
        super().__init__(context, fleet, trainer, self_test_prompt)
        self.in_flight = context.config.rollout.update == "in_flight"
        self.recorder = recorder
        self._link = threading.RLock()  # one transfer at a time
        self._changed = threading.Condition()
        self._forget()

    def _forget(self) -> None:
        self.version, self.arrived, self.tried = -1, -1, -1
        self.digests.clear()
        self.published: dict[int, bool] = {}  # version -> the weights have moved since the one before
        self.failure: BaseException | None = None
        self.receive_seconds = 0.0

    def begin(self, version: int) -> Stats:
        """At the start and after a loss of the trainer, when nothing works ahead."""
        began = time.perf_counter()
        self.trainer.ready()
        self._forget()
        held = self.trainer.publish(version, version)
        self.trainer.moved = False
        self.published[version] = False
        sent = self._bring(version)
        self._took(version)
        self.context.workers.background.start("carrier", self._carry)
        return {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(record.nbytes for record in sent.records)),
            "sync/snapshot_bytes": held,
            **self.self_tested,
        }

    def publish(self, version: int) -> Stats:
        """Keeps a copy of the weights, from which engines get them."""
        began = time.perf_counter()
        held = self.trainer.publish(version, max(self.version, 0))
        moved, self.trainer.moved = self.trainer.moved, False
        with self._changed:
            self.published[version] = moved
            self._changed.notify_all()
        return {"sync/publish_seconds": time.perf_counter() - began, "sync/snapshot_bytes": held}

    def hold(self, version: int) -> None:
        """See `Weights`. Raises what carrying weights has raised."""
        if self.in_flight:
            self._until(lambda: self.version >= version)
            return
        self._until(lambda: version in self.published or self.version == version)
        if self.version == version:
            return
        with self.fleet.gate.alone(), self._link:
            if self.version != version and not self._switch(version):
                self._bring_slowly(version)

    def ensure(self) -> int:
        """The version that engines sample from; where none is healthy, once new ones have it.

        Raises what carrying weights has raised: engines may be without a model by that.
        """
        if self.failure:
            raise self.failure
        self.fleet.retire()
        if not self.fleet.of(State.HEALTHY):
            with self.fleet.gate.alone(), self._link:
                if not self.fleet.of(State.HEALTHY):
                    self._bring_slowly(max(self.published) if self.in_flight else self.version)
        return self.version

    # The carrier

    def _carry(self) -> None:
        try:
            while True:
                self._until(lambda: self._wanted() is not None)
                version = self._wanted()
                assert version is not None
                with self._link:
                    arrived = self._receive_ahead(version)
                    switched = arrived and self.in_flight and self._switch(version)
                if self.in_flight and not switched:
                    with self.fleet.gate.alone(), self._link:
                        self._bring_slowly(version)
        except Cancelled:
            raise
        except BaseException as error:
            with self._changed:
                self.failure = error
                self._changed.notify_all()

    def _wanted(self) -> int | None:
        """The version that is to be carried next: the engines have room for one besides that which they sample from."""
        newer = [version for version in self.published if version > max(self.version, self.tried)]
        if not newer or self.arrived > self.version:
            return None
        return max(newer) if self.in_flight else min(newer)

    def _receive_ahead(self, version: int) -> bool:
        """Whether all engines have a version in their shadow copies; if not, `_bring_slowly` is the way."""
        self.tried = version
        if self.in_flight:
            self.fleet.gather(wait=False)
        if self._engines() != self.connected or not self.trainer.connected:
            return False
        began, self.parts = time.perf_counter(), {}
        send = self.trainer.ranks[0].send_published(version)
        receipts = self._receipts(version)
        deadlines = self.context.config.deadlines
        with self.recorder.lane("rollout", "receive", version):
            results = self.context.workers.outcomes(
                [send, *receipts], deadlines.sync + deadlines.health, "weight sync", worker_lives, finish_first=True
            )
        errors = [result for result in results if isinstance(result, GrpoError)]
        for error in errors:
            if isinstance(error, TrainerLost):
                self.trainer.noticed(error, [send.worker])
            if isinstance(error, TrainerLost) or not isinstance(error, ClusterError):
                raise error
        if errors:  # whoever asks the lost engine next replaces it
            self.trainer.connected = False
            return False
        self._verify(version, send, receipts, self._moved(version))
        self.receive_seconds = time.perf_counter() - began
        self.arrived = version
        return True

    def _moved(self, version: int) -> bool:
        """Whether the weights have moved since the version that was sent before."""
        return any(moved for number, moved in self.published.items() if self.version < number <= version)

    # The ways of a version into the engines' models

    def _switch(self, version: int) -> bool:
        """From the shadow copies, if all engines have it there; False if it has to be brought."""
        if not self.in_flight:
            self.fleet.gather(wait=False)
        if self.arrived != version or self._engines() != self.connected or not self.trainer.connected:
            return False
        began = time.perf_counter()
        try:
            with self.recorder.lane("rollout", "switch", version):
                self._commit(version, self.in_flight)
        except EngineLost:
            return False
        seconds = time.perf_counter() - began
        stats = {**self.parts, "sync/receive_seconds": self.receive_seconds, "sync/switch_seconds": seconds}
        stats["sync/seconds"] = self.receive_seconds + seconds
        stats["sync/bytes"] = float(sum(record.nbytes for record in self.records))
        self._took(version)
        self.recorder.log_version(version, stats, self.digest)
        return True

    def _bring_slowly(self, version: int) -> None:
        """To engines that may be new. Nothing may run on them, and the trainer waits."""
        with self.trainer.turn, self.recorder.lane("rollout", "sync", version):
            moved = self.trainer.moved  # of a step whose weights are not published yet
            self.trainer.ready()
            self._bring(version)
            self.trainer.moved = moved
        self._took(version)
        self.recorder.log_version(version, self.self_tested, self.digest)

    def _deliver(self, version: int) -> Manifest:
        send = self.trainer.ranks[0].send_published(version)
        receipts = self._receipts(version)
        self.parts = {}
        self._exchange([send, *receipts])
        moved = self._moved(version)
        if not self.self_tested:
            return self._verify(version, send, receipts, moved)
        # What was sent before is what the self-test took, the live weights: it may be this very version.
        sent = self._verify(version, send, receipts, moved=False)
        if moved and surely_changed(self.records) and self.digests.get(self.version) == self.digest:
            raise WeightSyncError(
                f"every engine must hold the trainer's weights, but the trainer has moved, and sent the weights of "
                f"version {self.version} again as version {version}; nothing was sampled from them, start the run again"
            )
        return sent

    def _took(self, version: int) -> None:
        with self._changed:
            self._taken(version)
            self.arrived = self.tried = version
            self.published = {number: moved for number, moved in self.published.items() if number >= version}
            self._changed.notify_all()

    def _until(self, true: Callable[[], bool]) -> None:
        with self._changed:
            while not true():
                self.context.workers.look()
                if self.failure:
                    raise self.failure
                self._changed.wait(SLICE_SECONDS)
