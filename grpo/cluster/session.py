"""A Ray session: start or connect, place actors by role, end lost ones, and leave no process behind."""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from grpo.cluster import processes as node
from grpo.cluster.waiting import HEALTH, ActorHandle, Call, HeadHeartbeat, Waiting
from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, GrpoError, Interrupted
from grpo.plan.placement import CPUS, OTHER_ROLE
from grpo.run.faults import publish_pids
from grpo.run.stopping import StopRequest
from grpo.run.watchdog import start_watchdog

GRACE_SECONDS = 10.0  # for an actor to end by itself before it is killed
SHUTDOWN_SECONDS = 20.0  # for Ray to leave a cluster


class Session:
    """The actors of one run. Use `session(config, stop)`, which also ends what it started."""

    def __init__(self, config: Config, stop: StopRequest, say: Callable[[str], None] = print) -> None:
        self.config, self.stop_request, self.say = config, stop, say
        self.device = "cpu"
        self.head: HeadHeartbeat | None = None
        self._own: list[psutil.Process] = []
        self._handles: list[ActorHandle] = []

    def start(self) -> None:
        """Connects to `cluster.address` or starts Ray on this machine with as many CPUs as the actors reserve."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address, actors = self.config.cluster.address, self.config.rollout.engines + self.config.train.ranks
        before = set(processes_below_us())  # reward workers
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                # Its ports are open to every user of this machine: a token of its own, not kept in the home folder.
                raylet: Any = ray._raylet
                os.environ["RAY_AUTH_MODE"] = "token"
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets everything else go first
                raylet.Config.initialize("")  # ray reads the mode once, at import
                ray.init(num_cpus=max(actors, os.cpu_count() or 1), include_dashboard=False, **quiet)
        except Exception as error:  # on a busy machine Ray gives up with a plain Exception
            where = f"the cluster at {address!r}" if address else "a local cluster"
            raise ClusterError(f"Ray cannot reach {where}: {error}; check cluster.address") from error
        self._own = [process for process in processes_below_us() if process not in before and address is None]
        for process in self._own:
            if process.name() == "raylet":  # its agents outlive it while they wait for a head that is gone
                start_watchdog(os.getpid(), "", process.pid)
        publish_pids("controller", [os.getpid()])
        heads = [process for process in self._own if process.name() == "gcs_server"]
        publish_pids("gcs", [process.pid for process in heads])
        self.head = HeadHeartbeat(self.config.deadlines.health, heads[0] if heads else None)
        waiting = Waiting(self.config, self.stop_request, self.head, self.discard)
        self.outcomes = waiting.outcomes
        has_gpus = resources().get("GPU", 0) > 0
        wanted = self.config.cluster.device
        self.device = wanted if wanted != "auto" else "cuda" if has_gpus else "cpu"
        if self.device == "cuda" and not has_gpus:
            raise ConfigError("cluster.device is cuda, but Ray sees no GPU; set cluster.device to cpu or auto")

    def create(self, actor_class: type, role: str, index: int, gpus: float, *args: object) -> ActorHandle:
        """An actor on a node of its role: one whose label `cluster.role_label` is not the other role's.

        Nothing retries a method (a second optimizer step would be silent), and a dead actor stays dead.
        """
        options = {
            "num_cpus": CPUS,
            "num_gpus": gpus if self.device == "cuda" else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "label_selector": {self.config.cluster.role_label: f"!in({OTHER_ROLE[role]})"},
        }
        make: Any = ray.remote
        if role == "trainer":  # its verbs block their thread, so signs of life need one of their own
            make = make(concurrency_groups={HEALTH: 1})
        remote = make(actor_class)
        label = f"{self.config.cluster.role_label}={OTHER_ROLE[role]}"
        needs = f"{CPUS} CPU, {options['num_gpus']:g} GPU, no label {label}"
        self._handles.append(ActorHandle(role, index, remote.options(**options).remote(*args), needs))
        return self._handles[-1]

    def get(self, calls: Sequence[Call], seconds: float, what: str, **options: Any) -> list[Any]:
        """Results of calls that make sense only together, in order; see `Waiting.outcomes`. Raises the first error."""
        return self.outcomes(calls, seconds, what, fail_fast=True, **options)

    def has_answered(self, call: Call) -> bool:
        return bool(ray.wait([call.ref], timeout=0)[0])

    def started(self, handle: ActorHandle, where: tuple[str, list[int]]) -> None:
        """Remembers the node and the processes that an actor tells once it has started."""
        handle.node_id, handle.pids = where
        if handle.role == "trainer":
            publish_pids("trainer_rank", [other.pids[0] for other in self.alive("trainer")])
        else:
            publish_pids("rollout_actor", [other.pids[0] for other in self.alive("rollout")])
            publish_pids("engine_core", [pid for other in self.alive("rollout") for pid in other.pids[1:2]])

    @property
    def headless(self) -> bool:
        """Whether Ray's head is lost, or was never there."""
        return self.head is None or self.head.lost

    def leaving(self, handles: Sequence[ActorHandle]) -> list[ActorHandle]:
        """Those whose node is about to go away."""
        draining = self.head.draining if self.head else frozenset()
        return [handle for handle in handles if handle.node_id in draining]

    def alive(self, role: str) -> list[ActorHandle]:
        """Started actors of a role that are not lost."""
        return [handle for handle in self._handles if handle.role == role and handle.pids and not handle.lost]

    def discard(self, handle: ActorHandle, error: GrpoError, stacks: bool) -> None:
        """Ends a lost actor and its processes; the stacks of a frozen one are written down first."""
        if handle.lost:
            return
        told = any(other.lost is error for other in self._handles)  # all ranks are lost with one
        handle.lost = error
        if not told:
            self.say(str(error))
        if handle.pids and stacks:
            self._write_stacks(handle)
        self._end(handle)

    def _end(self, handle: ActorHandle) -> None:
        with contextlib.suppress(RayError):
            ray.kill(handle.actor)
        if handle.pids:  # it leaves children, and a frozen process does not hear Ray
            node.on_node(handle.node_id, node.end, handle.pids)

    def _write_stacks(self, handle: ActorHandle) -> None:
        name = f"{handle.role}-{handle.index}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
        path = Path(self.config.run.dir, "stacks", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(node.on_node(handle.node_id, node.stacks, handle.pids) or "its node is gone")
        self.say(f"stacks of {handle}: {path}")

    def stop(self) -> None:
        """Asks every actor to close, kills those that do not, and waits until their processes are gone."""
        if not ray.is_initialized():
            return
        headless = self.headless
        if not headless:
            self._close_actors()
        if self.head:
            self.head.close()
        if headless:  # every verb of Ray would wait for its head for minutes
            node.end([process.pid for process in self._own if process.is_running()])
        leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        leaving.start()
        leaving.join(SHUTDOWN_SECONDS)
        node.end([process.pid for process in self._own if process.is_running()])

    def _close_actors(self) -> None:
        living = [handle for handle in self._handles if not handle.lost]
        closing = [handle.actor.close.remote() for handle in living]
        with contextlib.suppress(RayError):
            ray.wait(closing, num_returns=len(closing), timeout=GRACE_SECONDS)
        for handle in living:
            self._end(handle)
        self._handles = []


def resources() -> dict[str, float]:
    """All that the cluster's nodes offer."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def processes_below_us() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@contextlib.contextmanager
def session(config: Config, stop: StopRequest, say: Callable[[str], None] = print) -> Iterator[Session]:
    """A started session that is stopped on success, error, Ctrl-C and SIGTERM."""
    current = Session(config, stop, say)
    try:
        current.start()
        stop.listen()  # after ray.init, which installs handlers of its own
        yield current
    except SystemError as error:  # how a waiting ray.get or ray.wait reports what a signal handler raised
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # a second Ctrl-C must not cut the clean-up short
            signal.signal(number, signal.SIG_IGN)
        current.stop()
