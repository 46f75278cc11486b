"""How the driver waits for workers: with a deadline, and with a heartbeat, since Ray never reports a frozen process.

While calls are pending every worker is asked for a sign of life; one that gives none for `deadlines.health` seconds is
lost like one that has died: its stacks are written down and it is killed. So is one that misses the deadline itself.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from ray.exceptions import RayError, RaySystemError, RayTaskError, UnserializableException

from grpo.cluster.head import Head
from grpo.cluster.nodes import CONNECT_SECONDS, describe_nodes, is_reachable, log_folder
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, NoNode, TrainerLost
from grpo.interfaces import Call, Worker
from grpo.run.stopping import StopRequest

SLICE_SECONDS = 0.25  # between two looks at signals, the head and the workers
LOST: dict[str, type[EngineLost] | type[TrainerLost]] = {"rollout": EngineLost, "trainer": TrainerLost}
R = TypeVar("R")
Ask = Callable[[Any, float], Call[object]]
"""(worker, seconds) -> a call that is a sign of life."""


def process_lives(worker: Worker, seconds: float) -> Call[object]:
    """Asks the worker's process alone, whatever it is busy with."""
    return worker.ping(seconds)


class Heartbeat:
    """How long the workers of one wait have given no sign of life. Without `ask` they are asked nothing.

    Only time that this process has watched counts: if it was frozen itself, or busy with another worker, the workers
    are asked before they are blamed.
    """

    def __init__(self, workers: Sequence[Worker], ask: Ask | None, seconds: float) -> None:
        self.ask, self.seconds = ask, seconds
        self.seconds_since_heartbeat = {worker: 0.0 for worker in workers if ask}
        self.looked = time.monotonic()
        self.asked: dict[Future[object], Worker] = {}

    def frozen(self, waiting: set[Worker]) -> list[Worker]:
        """Workers in `waiting` that have been silent for too long; asks again those that have answered."""
        now = time.monotonic()
        watched, self.looked = min(now - self.looked, 2 * SLICE_SECONDS), now
        self.seconds_since_heartbeat = {
            worker: seconds + watched for worker, seconds in self.seconds_since_heartbeat.items()
        }
        for future in [future for future in self.asked if future.done()]:
            worker, error = self.asked.pop(future), future.exception()
            if error is None:
                self.seconds_since_heartbeat[worker] = 0.0
            elif isinstance(error, EngineLost):  # its process lives, but the engine core does not answer
                self.seconds_since_heartbeat[worker] = self.seconds
        for worker in set(self.seconds_since_heartbeat) - set(self.asked.values()):
            if self.ask and self.seconds_since_heartbeat[worker] > self.seconds / 4:
                self.asked[self.ask(worker, self.seconds / 2).future] = worker
        return [
            worker
            for worker, seconds in self.seconds_since_heartbeat.items()
            if worker in waiting and seconds >= self.seconds
        ]


class Waiting:
    """Waits for calls. `discard` ends a lost worker; it is told the error and whether there are stacks to look at."""

    def __init__(
        self, config: Config, stop: StopRequest, head: Head, discard: Callable[[Worker, GrpoError, bool], None]
    ) -> None:
        self.config, self.stop, self.head, self.discard = config, stop, head, discard
        self.gone: set[str] = set()  # nodes that went away without a word

    def outcomes(
        self,
        calls: Sequence[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
        fail_fast: bool = False,
    ) -> list[R | GrpoError]:
        """Results in order; a GrpoError in the place of a call that failed. Returns once all have ended.

        `ask` asks a worker for a sign of life; None asks nothing. With `fail_fast` the first failure is raised,
        without a wait for the rest. After a request to stop it raises Interrupted, with `finish_first` only when no
        time but that to commit is left. Raises ClusterError if Ray itself is lost.
        """
        deadline = time.monotonic() + seconds
        pending = {call.future: call for call in calls}
        results: dict[Future[R], R | GrpoError] = {}
        beat = Heartbeat([call.worker for call in calls], ask, self.config.deadlines.health)
        while pending:
            self.stop.check(finish_first)
            self.head.check()
            done = wait(pending, SLICE_SECONDS, FIRST_COMPLETED).done
            for future in [future for future in pending if future in done]:  # in the order of the calls
                results[future] = self._result(pending.pop(future), what)
            late = time.monotonic() > deadline
            waiting = {call.worker for call in pending.values()}
            for worker in waiting if late else beat.frozen(waiting):
                error = self._too_late(worker, seconds, what) if late else self._frozen(worker, what)
                self.discard(worker, error, True)
                lost = [call for call in pending.values() if call.worker is worker]
                results |= {pending.pop(call.future).future: error for call in lost}
            for result in results.values():
                if fail_fast and isinstance(result, GrpoError):
                    raise result
        return [results[call.future] for call in calls]

    def get(
        self,
        calls: Sequence[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
    ) -> list[R]:
        """Results of calls that make sense only together, in order; see `outcomes`. Raises the first error."""
        self.outcomes(calls, seconds, what, ask, finish_first, fail_fast=True)
        return [call.result for call in calls]

    def _result(self, call: Call[R], what: str) -> R | GrpoError:
        """Of a call that has ended. What it failed with is not raised: its traceback would keep the other results."""
        worker, error = call.worker, call.future.exception(timeout=0)
        if error is None:
            return call.result
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, GrpoError):
                return self._said(worker, error.cause)
            return ClusterError(f"{what}: {worker} failed: {last_line(error)}; logs are in {log_folder(self.config)}")
        if isinstance(error, UnserializableException | RaySystemError):  # it lives, and said what cannot be read here
            return ClusterError(f"{what}: {worker} failed: {last_line(error)}; logs are in {log_folder(self.config)}")
        if isinstance(error, RayError):  # the actor, or the node that kept its answer
            return self._died(worker, error, what)
        if isinstance(error, GrpoError):
            return self._said(worker, error)
        raise error

    def _said(self, worker: Worker, error: GrpoError) -> GrpoError:
        """What a worker that lives says itself."""
        if isinstance(error, EngineLost | TrainerLost):
            self.discard(worker, error, True)
        return error

    def _died(self, worker: Worker, error: Exception, what: str) -> GrpoError:
        died = LOST[worker.role](f"{what}: {worker} died: {last_line(error)}", self._counts(worker))
        self.discard(worker, died, False)
        return died

    def _counts(self, worker: Worker) -> bool:
        """Whether a loss counts: not one by a drain, and of all that go with one node the first only."""
        if not worker.pids:  # Ray may pick a lost node until it notices
            return not worker.node_is_lost()
        if worker.node_id in self.head.draining | self.gone:
            return False
        if not is_reachable(worker.node_id, CONNECT_SECONDS):
            self.gone.add(worker.node_id)
        return True

    def _frozen(self, worker: Worker, what: str) -> GrpoError:
        limit = self.config.deadlines.health
        said = f"{what}: {worker} is frozen: no sign of life for deadlines.health = {limit:g} s"
        return LOST[worker.role](said, self._counts(worker))

    def _too_late(self, worker: Worker, seconds: float, what: str) -> GrpoError:
        if not worker.pids and (wanted := worker.wanted_node()):
            nodes = describe_nodes(self.config.cluster.role_label, self.head.draining)
            return NoNode(
                f"{what}: no node for {worker} came within {seconds:g} s (deadlines.start): it needs {wanted}; "
                f"nodes: {'; '.join(nodes)}"
            )
        return LOST[worker.role](
            f"{what} must end within {seconds:g} s (deadlines.*), but {worker} has not answered; raise the deadline or "
            f"look at its stacks and at its log in {log_folder(self.config)}",
            self._counts(worker),
        )


def last_line(error: BaseException) -> str:
    """The line that says what happened: Ray puts a traceback before it and a list of guesses behind."""
    lines = [line.strip() for line in str(error).partition("Some common causes")[0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
