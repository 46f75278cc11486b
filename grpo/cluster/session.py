"""A Ray session: start or connect, place actors by role, and leave no process behind."""

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from grpo.cluster import processes, ray_private
from grpo.cluster.handles import HEALTH
from grpo.cluster.head import HeadHeartbeat
from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, Interrupted
from grpo.plan.placement import CPUS, OTHER_ROLE
from grpo.run.faults import publish_pids
from grpo.run.stopping import StopRequest
from grpo.run.watchdog import start_watchdog

SHUTDOWN_SECONDS = 20.0  # for Ray to leave a cluster
PAUSE_SECONDS = 2.0  # before a local Ray that did not come up is started again


class Session:
    """Ray, and the workers of one run. Use `session(config, stop)`, which also ends what it started."""

    workers: Workers

    def __init__(self, config: Config, stop: StopRequest, say: Callable[[str], None] = print) -> None:
        self.config, self.stop_request, self.say = config, stop, say
        self.device = "cpu"
        self.head: HeadHeartbeat | None = None
        self._own: list[psutil.Process] = []

    def start(self) -> None:
        """Connects to `cluster.address` or starts Ray on this machine with as many CPUs as the actors reserve."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self.config.cluster.address
        if address is not None:
            self._connect(address)
        else:
            self._start_here()
        publish_pids("controller", [os.getpid()])
        heads = [process for process in self._own if process.name() == "gcs_server"]
        publish_pids("gcs", [process.pid for process in heads])
        self.head = HeadHeartbeat(self.config.deadlines.health, heads[0] if heads else None)
        self.workers = Workers(self.config, self.stop_request, self.head, self.say)
        has_gpus = resources().get("GPU", 0) > 0
        wanted = self.config.cluster.device
        self.device = wanted if wanted != "auto" else "cuda" if has_gpus else "cpu"
        if self.device == "cuda" and not has_gpus:
            raise ConfigError("cluster.device is cuda, but Ray sees no GPU; set cluster.device to cpu or auto")

    def _connect(self, address: str) -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # Ray raises plain ones
            raise ClusterError(
                f"Ray cannot reach the cluster at {address!r}: {error}; check cluster.address"
            ) from error

    def _start_here(self) -> None:
        """Ray on this machine, again and again within `deadlines.start`: it gives its own node 30 s and no more."""
        # Its ports are open to every user of this machine: a token of its own, not kept in the home folder.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets everything else go first
        ray_private.read_settings()
        actors = self.config.rollout.engines + self.config.train.ranks
        before = set(processes_below_us())  # reward workers
        began, seconds = time.monotonic(), self.config.deadlines.start
        while True:
            error = self._try_to_start(max(actors, os.cpu_count() or 1))
            self._own = [process for process in processes_below_us() if process not in before]
            if error is None:
                break
            self.stop_request.listen()  # ray.init has put handlers of its own there, also where it fails
            said = " ".join(str(error).split())
            processes.end([process.pid for process in self._own if process.is_running()])
            leave_ray()
            self.stop_request.check()
            if isinstance(error, SystemExit):
                raise Interrupted("stopped by SIGTERM")
            if isinstance(error, ValueError | PermissionError):  # it will not come up later either
                raise ClusterError(
                    f"Ray cannot be started on this machine: {said}; unset RAY_ADDRESS or `ray stop` the Ray that runs "
                    "here, or set cluster.address to use it"
                ) from error
            if time.monotonic() - began > seconds:
                raise ClusterError(
                    f"Ray must come up on this machine within deadlines.start = {seconds:g} s, but: {said}; the "
                    "machine may be too busy or out of memory: free it, or raise deadlines.start"
                ) from error
            self.say(f"Ray did not come up on this machine ({said[:200]}); once more")
            time.sleep(PAUSE_SECONDS)
        for process in self._own:
            if process.name() == "raylet":  # its agents outlive it while they wait for a head that is gone
                start_watchdog(os.getpid(), "", process.pid)

    def _try_to_start(self, cpus: int) -> BaseException | None:
        """Why Ray did not come up; on a busy machine it gives up with a plain Exception, at SIGTERM it exits."""
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
        except (Exception, SystemExit) as error:
            return error
        return None

    def place(self, actor_class: type, role: str, gpus: float, *args: object) -> tuple[ActorHandle[Any], str]:
        """An actor on a node of its role, and what it reserves there, in words.

        A node of its role is one whose label `cluster.role_label` is not the other role's. Nothing retries a method (a
        second optimizer step would be silent), and a dead actor stays dead.
        """
        gpus = gpus if self.device == "cuda" else 0
        options = {
            "num_cpus": CPUS,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "label_selector": {self.config.cluster.role_label: f"!in({OTHER_ROLE[role]})"},
        }
        make: Any = ray.remote
        if role == "trainer":  # its verbs block their thread, so signs of life need one of their own
            make = make(concurrency_groups={HEALTH: 1})
        actor = make(actor_class).options(**options).remote(*args)
        return actor, f"{CPUS} CPU, {gpus:g} GPU, no label {self.config.cluster.role_label}={OTHER_ROLE[role]}"

    def stop(self) -> None:
        """Asks every worker to close, kills those that do not, and waits until their processes are gone."""
        if not ray.is_initialized():
            return
        headless = self.head is None or self.head.lost
        if not headless:
            self.workers.close()
        if self.head:
            self.head.close()
        if headless:  # every verb of Ray would wait for its head for minutes
            processes.end([process.pid for process in self._own if process.is_running()])
        leave_ray()
        processes.end([process.pid for process in self._own if process.is_running()])


def leave_ray() -> None:
    """Leaves the cluster; every verb of Ray may wait for a head that is gone."""
    leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS)


def resources() -> dict[str, float]:
    """All that the cluster's nodes offer."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def processes_below_us() -> list[psutil.Process]:
    """Children of this process, and theirs."""
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
