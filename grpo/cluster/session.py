"""A Ray session: start or connect, place actors by role, and leave no process behind."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from grpo.cluster import processes, ray_private
from grpo.cluster.border import bordered
from grpo.cluster.handles import BESIDE_TRAINING
from grpo.cluster.head import HeadHeartbeat
from grpo.cluster.local_ray import LocalRay, leave_ray
from grpo.cluster.nodes import ray_nodes
from grpo.cluster.sharing import SharedGpus
from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.config.train import no_offload
from grpo.errors import ClusterError, ConfigError, Interrupted
from grpo.plan.placement import (
    CPUS,
    OTHER_ROLE,
    ROLES,
    Group,
    Role,
    crowded,
    place,
    refusal,
    room_for_engines,
    with_engines,
)
from grpo.run.faults import publish_pids
from grpo.run.stopping import SIGNALS, StopRequest


class Session:
    """Ray, and the workers of one run. Use `session(config, stop)`, which also ends what it started."""

    workers: Workers

    def __init__(
        self,
        config: Config,
        stop: StopRequest,
        say: Callable[[str], None] = print,
        roles: Sequence[Role] = ROLES,
    ) -> None:
        self.config, self.stop_request, self.say, self.roles = config, stop, say, roles
        self.device = "cpu"
        self.head: HeadHeartbeat | None = None
        self.local: LocalRay | None = None
        self.most_engines = config.rollout.most_engines

    @property
    def _own(self) -> list[psutil.Process]:
        return self.local.processes if self.local else []

    def start(self) -> None:
        """Connects to `cluster.address` or starts Ray on this machine with as many CPUs as the actors reserve."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self.config.cluster.address
        if address is not None:
            self._connect(address)
        else:
            self.local = LocalRay(self.config, self.stop_request, self.say)
            self.local.start()
        publish_pids("controller", [os.getpid()])
        heads = [process for process in self._own if process.name() == "gcs_server"]
        publish_pids("gcs", [process.pid for process in heads])
        self.head = HeadHeartbeat(self.config.deadlines.health, heads[0] if heads else None)
        self.workers = Workers(self.config, self.stop_request, self.head, self.say)
        has_gpus = resources().get("GPU", 0) > 0
        wanted = self.config.cluster.device
        self.device = wanted if wanted != "auto" else "cuda" if has_gpus else "cpu"
        self.workers.device = self.device
        if self.device == "cuda" and not has_gpus:
            raise ConfigError("cluster.device is cuda, but Ray sees no GPU; set cluster.device to cpu or auto")
        if self.device == "cpu" and self.config.train.offloads:
            raise ConfigError(no_offload(self.config.train.offloads, "Ray sees no GPU"))
        self._plan_places()

    def _plan_places(self) -> None:
        """Which actors share a GPU. Raises ConfigError where they cannot, and no node may come that helps."""
        nodes = ray_nodes(self.config)
        if (
            reason := refusal(self.config, self.device, nodes, self.roles)
            if self.local
            else crowded(self.config, self.device)
        ):
            raise ConfigError(reason)
        rollout = self.config.rollout
        if self.local:  # where no node comes
            self.most_engines = room_for_engines(self.config, self.device, nodes, self.roles)
        groups: list[Group] = []
        if self.device == "cuda":
            layout = with_engines(self.config, self.most_engines) if rollout.elastic else self.config
            groups = place(layout, self.device, nodes, self.roles).groups
        self.shared = SharedGpus(groups, self.selector)

    def selector(self, role: Role, index: int) -> dict[str, str]:
        """Labels of the nodes where an actor may be: all but those of the other role.

        Engines that are not needed take nodes of their role alone, so that they never have the place of a rank.
        """
        spare = role == "rollout" and index >= self.config.rollout.fewest_engines and not self.local
        return {self.config.cluster.role_label: f"in({role})" if spare else f"!in({OTHER_ROLE[role]})"}

    def _connect(self, address: str) -> None:
        try:
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                job_config=ray_private.OwnPath(),
            )
        except Exception as error:  # Ray raises plain ones
            raise ClusterError(
                f"Ray cannot reach the cluster at {address!r}: {error}; check cluster.address"
            ) from error

    def place(
        self, actor_class: type, role: Role, gpus: float, config: Config | None, index: int, device: str
    ) -> tuple[ActorHandle[Any], str]:
        """An actor on a node of its role, and what it reserves there, in words. `index` counts the actors of a role.

        A node of its role is one whose label `cluster.role_label` is not the other role's. Nothing retries a method (a
        second optimizer step would be silent), and a dead actor stays dead.
        """
        if self.local:
            self.local.folder.offer(actor_class.__module__)
        gpus = gpus if self.device == "cuda" else 0
        options: dict[str, Any] = {
            "num_cpus": CPUS,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        strategy = self.shared.strategy(role, index, self.head.draining if self.head else frozenset()) if gpus else None
        if strategy:
            options["scheduling_strategy"] = strategy
        else:
            options["label_selector"] = self.selector(role, index)
        make: Any = ray.remote
        if role == "trainer":
            make = make(concurrency_groups=BESIDE_TRAINING)
        inside: type = bordered(actor_class, self.config, role, index, device)
        actor = make(inside).options(**options).remote(config, index, device)
        return actor, f"{CPUS} CPU, {gpus:g} GPU, no label {self.config.cluster.role_label}={OTHER_ROLE[role]}"

    def stop(self, failed: bool = False) -> None:
        """Asks every worker to close, kills those that do not, and waits until their processes are gone."""
        if ray.is_initialized():
            failed |= hasattr(self, "workers") and self.workers.lost_any
            headless = self.head is None or self.head.lost
            if not headless:
                self.workers.close()
            if self.head:
                self.head.close()
            if headless:  # every verb of Ray would wait for its head for minutes
                processes.end([process.pid for process in self._own if process.is_running()])
            leave_ray()
        if self.local:
            self.local.end(failed)


def resources() -> dict[str, float]:
    """All that the cluster's nodes offer."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


@contextlib.contextmanager
def session(
    config: Config, stop: StopRequest, say: Callable[[str], None] = print, roles: Sequence[Role] = ROLES
) -> Iterator[Session]:
    """A started session for actors of these roles that is stopped on success, error and a signal."""
    current, failed = Session(config, stop, say, roles), False
    try:
        current.start()
        stop.listen()  # after ray.init, which installs handlers of its own
        yield current
    except SystemError as error:  # how a waiting ray.get or ray.wait reports what a signal handler raised
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        failed = True
        raise
    except Exception as error:
        failed = not isinstance(error, Interrupted)
        raise
    finally:
        for number in SIGNALS:  # a second Ctrl-C must not cut the clean-up short
            signal.signal(number, signal.SIG_IGN)
        current.stop(failed)
