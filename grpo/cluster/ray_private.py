"""All that is used of Ray beyond its public API, as it is in Ray 2.60.0. Look here first when the pin moves."""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ray
from ray._private import ray_constants, services
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray.actor import ActorHandle
from ray.job_config import JobConfig

from grpo.errors import ClusterError

PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto: a reason that it cannot refuse."""
END_SECONDS = 10
ALIVE = 0
"""State of a node in Ray's table; also the number that protobuf leaves out."""
DAEMONS = ("ray.dashboard.dashboard", "ray.dashboard.agent", "ray._private.runtime_env.agent.main")
"""Python programs that Ray starts beside its own binaries."""


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
    than Linux, where this switch is off; among its ports is one of metrics that asks for no token.
    """
    reachable = ray_constants.ENABLE_RAY_CLUSTER
    real: Any = services.ConsolePopen

    def start(command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> Any:
        added = {name: value for name, value in env.items() if os.environ.get(name) != value}
        added["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        return real(command, env={**environment, **added}, start_new_session=True, **options)

    services.ConsolePopen = start  # type: ignore[assignment, misc]
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable
        services.ConsolePopen = real  # type: ignore[misc]


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
