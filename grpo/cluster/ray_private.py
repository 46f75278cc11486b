"""All that is used of Ray beyond its public API, as it is in Ray 2.60.0. Look here first when the pin moves."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray._private import parameter, ray_constants, services, utils
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray.actor import ActorHandle
from ray.job_config import JobConfig

from grpo.cluster import idle_agent
from grpo.errors import ClusterError
from grpo.run.replaced import replaced

PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto: a reason that it cannot refuse."""
END_SECONDS = 10
ALIVE = 0
"""State of a node in Ray's table; also the number that protobuf leaves out."""
PROGRAMS = ("ray._private.workers.default_worker",)
"""Python programs that a Ray of our own starts beside its binaries."""
AGENTS = {
    "--dashboard_agent_command": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
    "--runtime_env_agent_command": ("runtime_env_agent_port",),
}
"""What a raylet is told to start as its agents, and the ports that it then waits for."""


def read_settings() -> None:
    """Lets Ray read its RAY_* variables again; it reads some of them once, at import."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


class OwnPath(JobConfig):
    """A job whose workers look for modules where their installation is, not in the driver's folder as well."""

    def _runtime_env_has_working_dir(self) -> bool:
        """For Ray a reason not to add the folders of the driver and of its script to the path of the workers."""
        return True


@contextlib.contextmanager
def daemons(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, Ray's own processes start with `environment`, in a session of their own, and listen on loopback alone.

    So a signal to our process group (a terminal's Ctrl-C, `timeout`, a scheduler) does not end Ray before we have
    committed. They still end with this process: the kernel sees to that. Loopback is what Ray does on other systems
    than Linux, where this switch is off. Only its binaries start: see `binaries_alone`.
    """

    def started(real: Any, command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> Any:
        added = {name: value for name, value in env.items() if os.environ.get(name) != value}
        added["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        return real(command, env={**environment, **added}, start_new_session=True, **options)

    with (
        binaries_alone(),
        replaced(services, "ConsolePopen", partial(started, services.ConsolePopen)),
        replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
    ):
        yield


@contextlib.contextmanager
def binaries_alone() -> Iterator[None]:
    """Inside, a node of Ray starts without the Python programs that serve dashboards, jobs, metrics, logs and the like.

    Where nobody asks them anything, five interpreters that import for seconds are a tenth of the work of a start.
    """

    def started(real: Any, command: Sequence[str], **options: Any) -> Any:
        return real(with_idle_agents(command), **options)

    def fewer(real: Any, **options: Any) -> Any:
        return real(**{**options, "no_monitor": True, "include_log_monitor": False, "ray_client_server_port": None})

    with (
        replaced(services, "ConsolePopen", partial(started, services.ConsolePopen)),
        replaced(services, "start_api_server", lambda *_, **__: (None, None)),
        replaced(utils, "get_dashboard_dependency_error", lambda: None),  # it imports all that they would need
        replaced(parameter, "RayParams", partial(fewer, parameter.RayParams)),
    ):
        yield


def with_idle_agents(command: Sequence[str]) -> list[str]:
    """A command of Ray's with `idle_agent.py` for each agent that it names."""
    options = dict(argument.partition("=")[::2] for argument in command)
    idle = [sys.executable, "-I", "-S", idle_agent.__file__, *map(options.get, ("--session_dir", "--node_id"))]
    return [
        f"{name}={subprocess.list2cmdline([*map(str, idle), *AGENTS[name]])}" if name in AGENTS else argument
        for argument in command
        for name in [argument.partition("=")[0]]
    ]


def node_table() -> list[dict[str, Any]]:
    """Every node that ever was in the cluster; asks Ray's head."""
    table: list[dict[str, Any]] = state.node_table()  # type: ignore[no-untyped-call]
    return table


def actor_entry(actor: ActorHandle[Any]) -> dict[str, Any]:
    """What Ray's head knows of an actor: its node and when it started (0: not yet)."""
    found: dict[str, Any] = state.actor_table(actor._actor_id.hex())
    return found


def logs_folder() -> str:
    """Where Ray writes the output of the actors of this node."""
    node: Any = ray._private.worker.global_worker.node
    return str(node.get_logs_dir_path())


class HeadClient(Protocol):
    """What is asked of Ray's head; times in seconds."""

    def check_alive(self, nodes: Sequence[object], timeout: float) -> object:
        """Raises RayError or the like if the head does not answer."""
        ...

    def get_draining_nodes(self, timeout: float) -> Mapping[str, int]:
        """Ids of nodes that are about to go away, and until when."""
        ...

    def get_all_node_info(self, timeout: float) -> Mapping[object, Any]:
        """A record of each node that ever was."""
        ...

    def drain_node(self, node_id: str, reason: int, message: str, deadline_ms: int, timeout: float) -> object:
        """Marks a node as about to go away."""
        ...

    async def async_get_all_actor_info(self, actor_state_name: str, timeout: float) -> Mapping[object, Any]:
        """A record of each actor in a state."""
        ...


def driver_head_client() -> HeadClient:
    """This driver's own connection to Ray's head."""
    client: HeadClient = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    return client


def head_client(address: str) -> HeadClient:
    """A connection to Ray's head of a process that does not join the cluster."""
    raylet: Any = ray._raylet
    client: HeadClient = raylet.GcsClient(address=address)
    return client


def bootstrap_address(address: str) -> str | None:
    """Where Ray's head is; "auto": that of the cluster this machine belongs to. None if there is none."""
    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError:
        return None


def end_job(message: str) -> None:
    """Tells Ray that the job which this process belongs to was stopped, and why; how it exits then counts no more.

    Raises ClusterError outside of a job, and whatever Ray raises.
    """
    from ray.dashboard.modules.job.common import JobInfoStorageClient, JobStatus

    said = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job, address = said.get("metadata", {}).get("job_submission_id"), os.environ.get("RAY_ADDRESS")
    if not job or not address:
        raise ClusterError("must run as a job of Ray's, but the environment names none; submit it as one")
    jobs = JobInfoStorageClient(ray._raylet.GcsClient(address=address))  # type: ignore[attr-defined]
    asyncio.run(jobs.put_status(job, JobStatus.STOPPED, message=message, timeout=END_SECONDS))
