"""How the driver waits for workers: with a deadline, and with a heartbeat, since Ray never reports a frozen process.

While calls are pending every worker is asked for a sign of life; one that gives none for `deadlines.health` seconds is
lost like one that has died: its stacks are written down and it is killed. So is one that misses the deadline itself.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ray.exceptions import ActorDiedError, RayError, RaySystemError, RayTaskError, UnserializableException

from grpo.cluster import processes
from grpo.cluster.border import traceback_file
from grpo.cluster.head import Head
from grpo.cluster.heartbeat import SLICE_SECONDS, Ask, Heartbeat, process_lives
from grpo.cluster.nodes import CONNECT_SECONDS, describe_nodes, is_reachable, log_folder
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, NoNode, TrainerLost
from grpo.interfaces import Call, Worker
from grpo.run.advice import LOST, Where, typed
from grpo.run.background import Background
from grpo.run.failures import Failure, Kind, look
from grpo.run.stopping import StopRequest

OTHERS_SECONDS = 2.0  # for the others to say why a connection between them broke
FOREIGN = (RayTaskError, UnserializableException, RaySystemError)
"""What an actor that lives answers."""
R = TypeVar("R")


class Waiting:
    """Waits for calls. `discard` ends a lost worker; it is told the error and whether there are stacks to look at."""

    def __init__(
        self, config: Config, stop: StopRequest, head: Head, discard: Callable[[Worker, GrpoError, bool], None]
    ) -> None:
        self.config, self.stop, self.head, self.discard = config, stop, head, discard
        self.background = Background()
        self.gone: set[str] = set()  # nodes that went away without a word
        self.oom_kills: dict[str, int] = {}  # by node, before its newest worker started
        self.device = ""

    def look(self, finish_first: bool = False) -> None:
        """Raises Interrupted after a request to stop, Cancelled in a thread that works ahead and must end."""
        self.background.look(self.stop, finish_first)

    def outcomes(
        self,
        calls: Sequence[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
        fail_fast: bool = False,
        stoppable: bool = True,
    ) -> list[R | GrpoError]:
        """Results in order; a GrpoError in the place of a call that failed. Returns once all have ended.

        `ask` asks a worker for a sign of life; None asks nothing. With `fail_fast` a failure is raised without a wait
        for the rest; where a connection broke, the others have a moment to say why. After a request to stop it raises
        Interrupted, with `finish_first` only when no time but that to commit is left, without `stoppable` never, since
        somebody else watches for it; in a thread that works ahead it raises Cancelled once that was told to end. Raises
        ClusterError if Ray itself is lost.
        """
        results: dict[Future[R], R | GrpoError] = {}
        failed_at = 0.0
        for ended in self.as_ended(list(calls), seconds, what, ask, finish_first, stoppable):
            results |= ended
            failed = [result for result in results.values() if isinstance(result, GrpoError)]
            if fail_fast and failed:
                failed_at = failed_at or time.monotonic()
                worst = min(failed, key=consequence)
                done = len(results) == len(calls)
                if done or consequence(worst) < 2 or time.monotonic() - failed_at > OTHERS_SECONDS:
                    raise worst
        return [results[call.future] for call in calls]

    def as_ended(
        self,
        calls: list[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
        stoppable: bool = True,
        leaving: Callable[[], Sequence[Worker]] = tuple,
    ) -> Iterator[Mapping[Future[R], R | GrpoError]]:
        """What has ended since the last look, which may be nothing, until all have; see `outcomes`.

        Calls that are appended to `calls` meanwhile are waited for too, each `seconds` long. Who is `leaving` is not
        waited for.
        """
        beat = Heartbeat([call.worker for call in calls], ask, self.config.deadlines.health)
        pending: dict[Future[R], tuple[Call[R], float]] = {}
        known = 0
        while pending or known < len(calls):
            now = time.monotonic()
            pending |= {call.future: (call, now + seconds) for call in calls[known:]}
            known = len(calls)
            if stoppable:
                self.look(finish_first)
            self.head.check()
            done = wait(pending, SLICE_SECONDS, FIRST_COMPLETED).done
            ended: dict[Future[R], R | GrpoError] = {}
            for future in [future for future in pending if future in done]:  # in the order of the calls
                ended[future] = self._result(pending.pop(future)[0], what)
            waiting = {call.worker for call, _ in pending.values()}
            late = {call.worker for call, end in pending.values() if time.monotonic() > end}
            frozen = beat.frozen(waiting)
            going = set(leaving()) & waiting
            for worker in late.union(frozen, going):
                if worker in going:
                    error: GrpoError = EngineLost(f"{worker} leaves: its node is about to go away", counts=False)
                else:
                    error = self.too_late(worker, seconds, what) if worker in late else self._frozen(worker, what)
                self.discard(worker, error, worker not in going)
                lost = [future for future, (call, _) in pending.items() if call.worker is worker]
                ended |= {pending.pop(future)[0].future: error for future in lost}
            yield ended

    def first(self, calls: Sequence[Call[R]], seconds: float) -> None:
        """Returns once one of the calls has ended, or that time has passed. Raises as `outcomes` does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            self.head.check()
            if wait([call.future for call in calls], SLICE_SECONDS, FIRST_COMPLETED).done:
                return

    def get(
        self,
        calls: Sequence[Call[R]],
        seconds: float,
        what: str,
        ask: Ask | None = process_lives,
        finish_first: bool = False,
        stoppable: bool = True,
    ) -> list[R]:
        """Results of calls that make sense only together, in order; see `outcomes`. Raises the first error."""
        self.outcomes(calls, seconds, what, ask, finish_first, True, stoppable)
        return [call.result for call in calls]

    def _result(self, call: Call[R], what: str) -> R | GrpoError:
        """Of a call that has ended. What it failed with is not raised: its traceback would keep the other results."""
        worker, error = call.worker, call.future.exception(timeout=0)
        if error is None:
            return call.result
        if isinstance(error, RayTaskError) and isinstance(error.cause, GrpoError):
            return self._said(worker, error.cause, what)
        if isinstance(error, GrpoError):
            return self._said(worker, error, what)
        unborn = isinstance(error, ActorDiedError) and error.actor_init_failed
        if isinstance(error, RayError) and not (isinstance(error, FOREIGN) or unborn):
            return self._died(worker, error, what)  # the actor, or the node that kept its answer
        return self._said(worker, self._foreign(worker, error, what), what)

    def _foreign(self, worker: Worker, error: BaseException, what: str) -> GrpoError:
        """What a worker that lives says in words that are not ours, or that cannot be read here."""
        where = self._where(worker, what)
        failure = look(error)
        if isinstance(error, RayTaskError) and type(error.cause) is not RayError:
            failure = replace(look(error.cause), traceback=str(error))
        elif isinstance(error, RayError):
            said = RuntimeError(last_line(error.cause if isinstance(error, RayTaskError) else error))
            failure = replace(look(said), error=type(error).__name__, traceback=str(error))
        return typed(failure, where, str(traceback_file(where)))

    def _where(self, worker: Worker, what: str) -> Where:
        return Where(self.config, worker.role, worker.index, what, self.device)

    def _said(self, worker: Worker, error: GrpoError, what: str) -> GrpoError:
        """What a worker that lives says itself."""
        if error.traceback:
            self._keep_traceback(error)
        if isinstance(error, EngineLost | TrainerLost):
            error = self._out_of_memory(worker, str(error), what) or error
            self.discard(worker, error, True)
        return error

    def _keep_traceback(self, error: GrpoError) -> None:
        path = Path(error.traceback_file)
        with contextlib.suppress(OSError):  # a full disk; the error itself is what counts
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(r"\x1b\[\d+m", "", error.traceback), encoding="utf-8", errors="replace")

    def _died(self, worker: Worker, error: Exception, what: str) -> GrpoError:
        said = str(error)
        died = self._out_of_memory(worker, said, what) or LOST[worker.role](
            f"{what}: {worker} died: {last_line(error)}", self._counts(worker)
        )
        self.discard(worker, died, False)
        return died

    def _out_of_memory(self, worker: Worker, said: str, what: str) -> GrpoError | None:
        """If a process of the worker was killed for want of memory: by the kernel, in its container, or by Ray."""
        by_ray = "low on memory" in said
        if not worker.pids or worker.node_id in self.head.draining:
            return None
        kills, limit = processes.on_node(worker.node_id, processes.memory, worker.pids) or (0, "unknown")
        if not by_ray and kills <= self.oom_kills.get(worker.node_id, 0):
            return None
        who = "Ray's memory monitor" if by_ray else "the kernel (oom-kill)"
        text = f"{who} ended a process of it; the limit of its machine or container is {limit}"
        return typed(Failure(Kind.MEMORY, text), self._where(worker, what))

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

    def too_late(self, worker: Worker, seconds: float, what: str) -> GrpoError:
        """Of a worker that has not answered in time."""
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


def consequence(error: GrpoError) -> int:
    """0 for what would come again, then a loss, then a connection that broke, mostly since another worker failed."""
    return 0 if not isinstance(error, ClusterError) else 1 if type(error) is not ClusterError else 2


def last_line(error: BaseException) -> str:
    """The line that says what happened: Ray puts a traceback before it and a list of guesses behind."""
    lines = [line.strip() for line in str(error).partition("Some common causes")[0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
