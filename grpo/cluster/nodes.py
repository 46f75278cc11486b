"""What Ray knows about nodes and who is on them. It asks Ray's head, which must be there."""

import contextlib
import socket
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from grpo.cluster import ray_private
from grpo.config import Config
from grpo.plan.placement import CPUS, Node
from grpo.run.layout import LOGS

CONNECT_SECONDS = 3.0
"""How long a node's port may take to open; far longer than it does."""


def has_place(actor: ActorHandle[Any]) -> bool:
    """Whether Ray has found a node for an actor, now or before it died."""
    return bool(ray_private.actor_entry(actor).get("StartTime"))  # nothing is known of one that was just asked for


def node_is_lost(actor: ActorHandle[Any]) -> bool:
    """Whether the node that Ray chose for an actor is gone."""
    node_id = ray_private.actor_entry(actor).get("Address", {}).get("NodeID")
    return node_id not in {node["NodeID"] for node in living_nodes()}


def is_reachable(node_id: str, seconds: float) -> bool:
    """Whether a node's port can be reached. Ray itself takes a minute to notice that a node is gone."""
    for node in living_nodes():
        if node["NodeID"] == node_id:
            with contextlib.suppress(OSError):
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), seconds).close()
                return True
    return False


def describe_nodes(role_label: str, draining: frozenset[str]) -> list[str]:
    """What the living nodes have and are for, one text each."""
    texts = []
    for node in living_nodes():
        has = [f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU")]
        what = [node["Labels"].get(role_label, "no role"), *has, *["draining"][: node["NodeID"] in draining]]
        texts.append(f"{node['NodeManagerHostname']} ({', '.join(what)})")
    return texts


def ray_nodes(config: Config) -> list[Node]:
    """Nodes of the cluster that are alive, by name."""
    found = [
        Node(
            id=entry["NodeID"],
            name=entry["NodeManagerHostname"],
            address=entry["NodeManagerAddress"],
            role=entry["Labels"].get(config.cluster.role_label),
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
            object_store=int(entry["Resources"].get("object_store_memory", 0)),
        )
        for entry in living_nodes()
    ]
    return sorted(found, key=lambda node: (node.name, node.id))


def living_nodes() -> list[dict[str, Any]]:
    """What Ray's head says of each node that is alive."""
    return [node for node in ray_private.node_table() if node["Alive"]]


def on_my_node(config: Config, actors: int) -> int:
    """How many of so many actors of a role may share the cores of the node that this actor runs on.

    Each reserves a CPU of Ray's: a node that joins with 1, as the chart's pods of one engine do, never has two.
    """
    if config.cluster.address is None:  # one machine has them all
        return actors
    mine = ray.get_runtime_context().get_node_id()
    found = [node["Resources"].get("CPU", 0.0) for node in living_nodes() if node["NodeID"] == mine]
    return max(1, min(actors, int(sum(found) / CPUS))) if found else actors


def log_folder(config: Config) -> str:
    """Where the actors' output is to be found, of a Ray on this machine once the run has ended."""
    logs = Path(ray_private.logs_folder())
    return str(logs if config.cluster.address is not None else Path(config.run.dir, LOGS, logs.parent.name))
