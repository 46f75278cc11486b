"""How the driver waits for actors: with a deadline, and with a heartbeat, since Ray never reports a frozen process.

While calls are pending every actor is asked for a sign of life; one that gives none for `deadlines.health` seconds is
lost like one that has died: its stacks are written down and it is killed. So is one that misses the deadline itself.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from grpo.cluster.nodes import CONNECT_SECONDS, describe_nodes, has_place, is_reachable, log_folder, node_is_lost
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError, NoNode, TrainerLost
from grpo.run.stopping import StopRequest

SLICE_SECONDS = 0.25  # ray.wait looks at signals only when it returns
HEALTH = "health"  # concurrency group of a trainer rank, whose other verbs block their thread
LOST = {"rollout": EngineLost, "trainer": TrainerLost}


@dataclass(eq=False)
class ActorHandle:
    """An actor and where it runs; `pids` are its process and those below it, once it has told.

    `needs` says what a node must have to host it.
    """

    role: str
    index: int
    actor: Any
    needs: str = ""
    node_id: str = ""
    pids: list[int] = field(default_factory=list)
    lost: GrpoError | None = None

    def call(self, verb: str, *args: object) -> "Call":
        return Call(self, getattr(self.actor, verb).remote(*args))

    def ask(self, verb: str, seconds: float) -> Any:
        """A sign of life, beside whatever the actor is doing: an engine is a coroutine, a rank has a thread for it."""
        method = getattr(self.actor, verb)
        return (method.options(concurrency_group=HEALTH) if self.role == "trainer" else method).remote(seconds)

    def __str__(self) -> str:
        return f"{'engine' if self.role == 'rollout' else 'trainer rank'} {self.index}"


@dataclass(frozen=True, eq=False)
class Call:
    handle: ActorHandle
    ref: Any


class Heartbeat:
    """How long the actors of one wait have given no sign of life. `verb` is what they are asked; "" asks nothing.

    Only time that this process has watched counts: if it was frozen itself, or busy with another actor, the actors
    are asked before they are blamed.
    """

    def __init__(self, handles: Sequence[ActorHandle], verb: str, seconds: float) -> None:
        self.verb, self.seconds = verb, seconds
        self.seconds_since_heartbeat = {handle: 0.0 for handle in handles if verb}
        self.looked = time.monotonic()
        self.asked: dict[Any, ActorHandle] = {}

    def frozen(self, waiting: set[ActorHandle]) -> list[ActorHandle]:
        """Actors in `waiting` whose last heartbeat is too old; asks again those that have answered."""
        now = time.monotonic()
        watched, self.looked = min(now - self.looked, 2 * SLICE_SECONDS), now
        self.seconds_since_heartbeat = {
            handle: seconds + watched for handle, seconds in self.seconds_since_heartbeat.items()
        }
        done = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)[0] if self.asked else []
        for ref in done:
            handle = self.asked.pop(ref)
            try:
                ray.get(ref)
                self.seconds_since_heartbeat[handle] = 0.0
            except EngineLost:  # its actor lives, but the engine core does not answer
                self.seconds_since_heartbeat[handle] = self.seconds
            except RayError:  # it is dead, which the call itself will tell
                continue
        for handle in set(self.seconds_since_heartbeat) - set(self.asked.values()):
            if self.seconds_since_heartbeat[handle] > self.seconds / 4:
                self.asked[handle.ask(self.verb, self.seconds / 2)] = handle
        return [
            handle
            for handle, seconds in self.seconds_since_heartbeat.items()
            if handle in waiting and seconds >= self.seconds
        ]


class Waiting:
    """Waits for calls. `discard` ends a lost actor; it is told the error and whether there are stacks to look at."""

    def __init__(
        self,
        config: Config,
        stop: StopRequest,
        head: "HeadHeartbeat",
        discard: Callable[[ActorHandle, GrpoError, bool], None],
    ) -> None:
        self.config, self.stop, self.head, self.discard = config, stop, head, discard
        self.gone: set[str] = set()  # nodes that went away without a word

    def outcomes(
        self,
        calls: Sequence[Call],
        seconds: float,
        what: str,
        heartbeat: str = "ping",
        finish_first: bool = False,
        fail_fast: bool = False,
    ) -> list[Any]:
        """Results in order; a GrpoError in the place of a call that failed. Returns once all have ended.

        `heartbeat` is the verb that asks for a sign of life, "" for none. With `fail_fast` the first failure is raised,
        without a wait for the rest. After a request to stop it raises Interrupted, with `finish_first` only when no
        time but that to commit is left. Raises ClusterError if Ray itself is lost.
        """
        deadline = time.monotonic() + seconds
        pending = {call.ref: call for call in calls}
        results: dict[Any, Any] = {}
        beat = Heartbeat([call.handle for call in calls], heartbeat, self.config.deadlines.health)
        while pending:
            self.stop.check(finish_first)
            self.head.check()
            done, _ = ray.wait(list(pending), num_returns=1, timeout=SLICE_SECONDS)
            for ref in done:
                results[ref] = self._result(pending.pop(ref), what)
            late = time.monotonic() > deadline
            waiting = {call.handle for call in pending.values()}
            for handle in waiting if late else beat.frozen(waiting):
                error = self._too_late(handle, seconds, what) if late else self._frozen(handle, what)
                self.discard(handle, error, True)
                lost = [call for call in pending.values() if call.handle is handle]
                results |= {pending.pop(call.ref).ref: error for call in lost}
            for error in results.values():
                if fail_fast and isinstance(error, GrpoError):
                    raise error
        return [results[call.ref] for call in calls]

    def _result(self, call: Call, what: str) -> Any:
        try:
            return ray.get(call.ref)
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, GrpoError):
                return ClusterError(f"{what}: {call.handle} failed: {last_line(error)}; logs are in {log_folder()}")
            if isinstance(cause, EngineLost | TrainerLost):
                self.discard(call.handle, cause, True)
            return cause
        except RayActorError as error:
            handle = call.handle
            died = LOST[handle.role](f"{what}: {handle} died: {last_line(error)}", self._counts(handle))
            self.discard(handle, died, False)
            return died

    def _counts(self, handle: ActorHandle) -> bool:
        """Whether a loss counts: not one by a drain, and of all that go with one node the first only."""
        if not handle.pids:  # Ray may pick a lost node until it notices
            return not node_is_lost(handle.actor)
        if handle.node_id in self.head.draining | self.gone:
            return False
        if not is_reachable(handle.node_id, CONNECT_SECONDS):
            self.gone.add(handle.node_id)
        return True

    def _frozen(self, handle: ActorHandle, what: str) -> GrpoError:
        limit = self.config.deadlines.health
        said = f"{what}: {handle} is frozen: no sign of life for deadlines.health = {limit:g} s"
        return LOST[handle.role](said, self._counts(handle))

    def _too_late(self, handle: ActorHandle, seconds: float, what: str) -> GrpoError:
        if not handle.pids and not has_place(handle.actor):
            nodes = describe_nodes(self.config.cluster.role_label, self.head.draining)
            return NoNode(
                f"{what}: no node for {handle} came within {seconds:g} s (deadlines.start): it needs {handle.needs}; "
                f"nodes: {'; '.join(nodes)}"
            )
        return LOST[handle.role](
            f"{what} must end within {seconds:g} s (deadlines.*), but {handle} has not answered; raise the deadline or "
            f"look at its stacks and at its log in {log_folder()}",
            self._counts(handle),
        )


class HeadHeartbeat:
    """Asks Ray's head (the GCS) for a sign of life in the background; a frozen one is reported by nobody else.

    Like Heartbeat it counts only time that it has watched. The death of `process`, if it runs here, is noticed at once.
    `draining` are the ids of all nodes that were ever about to go away.
    """

    def __init__(self, seconds: float, process: psutil.Process | None = None) -> None:
        self.seconds, self.process = seconds, process
        self.pause, self.patience = min(1.0, seconds / 4), seconds / 4
        self.seconds_since_heartbeat = 0.0
        self.error = ""
        self.draining: frozenset[str] = frozenset()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="head-heartbeat", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self.seconds_since_heartbeat >= self.seconds

    def check(self) -> None:
        """Raises ClusterError if the head's last heartbeat is older than `seconds`."""
        if self.lost:
            raise ClusterError(
                f"Ray's head must answer within deadlines.health = {self.seconds:g} s, but it is dead or frozen "
                f"({self.error}); start the run again, it resumes from its last checkpoint"
            )

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        worker: Any = ray._private.worker.global_worker
        node = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
        asked = time.monotonic()
        while not self._ended.wait(self.pause):
            if self.process and has_ended(self.process):
                self.seconds_since_heartbeat, self.error = self.seconds, "its process has ended"
                return
            try:
                worker.gcs_client.check_alive([node], timeout=self.patience)
                self.seconds_since_heartbeat = 0.0
            except (RayError, GetTimeoutError, RuntimeError) as error:
                self.error = str(error)
                self.seconds_since_heartbeat += min(time.monotonic() - asked, self.pause + self.patience)
            with contextlib.suppress(RayError, GetTimeoutError, RuntimeError):  # a head that is silent tells nothing
                self.draining |= worker.gcs_client.get_draining_nodes(timeout=self.patience).keys()
            asked = time.monotonic()


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def last_line(error: BaseException) -> str:
    """The line that says what happened: Ray puts a traceback before it and a list of guesses behind."""
    lines = [line.strip() for line in str(error).partition("Some common causes")[0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
