"""All that is used of Ray beyond its public API, as it is in Ray 2.60.0. Look here first when the pin moves."""

from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state

PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto: a reason that it cannot refuse."""
ALIVE = 0
"""State of a node in Ray's table; also the number that protobuf leaves out."""


def read_settings() -> None:
    """Lets Ray read its RAY_* variables again; it reads some of them once, at import."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")


def node_table() -> list[dict[str, Any]]:
    """Every node that ever was in the cluster; asks Ray's head."""
    table: list[dict[str, Any]] = state.node_table()  # type: ignore[no-untyped-call]
    return table


def actor_entry(actor: Any) -> dict[str, Any]:
    """What Ray's head knows of an actor: its node and when it started (0: not yet)."""
    found: dict[str, Any] = state.actor_table(actor._actor_id.hex())
    return found


def logs_folder() -> str:
    """Where Ray writes the output of the actors of this node."""
    node: Any = ray._private.worker.global_worker.node
    return str(node.get_logs_dir_path())


def driver_head_client() -> Any:
    """This driver's own connection to Ray's head: `check_alive`, `get_draining_nodes`."""
    worker: Any = ray._private.worker.global_worker
    return worker.gcs_client


def head_client(address: str) -> Any:
    """A connection to Ray's head of a process that does not join the cluster."""
    raylet: Any = ray._raylet
    return raylet.GcsClient(address=address)


def bootstrap_address(address: str) -> str | None:
    """Where Ray's head is; "auto": that of the cluster this machine belongs to. None if there is none."""
    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError:
        return None
