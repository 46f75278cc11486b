"""What Ray knows about nodes and who is on them. It asks Ray's head, which must be there."""

from typing import Any

from ray._private.state import state


def has_place(actor: Any) -> bool:
    """Whether Ray has found a node for an actor, now or before it died."""
    return bool(_known(actor)["StartTime"])


def node_is_lost(actor: Any) -> bool:
    """Whether the node that Ray chose for an actor is gone."""
    return _known(actor)["Address"]["NodeID"] not in {node["NodeID"] for node in living_nodes()}


def describe_nodes(role_label: str, draining: frozenset[str]) -> list[str]:
    """What the living nodes have and are for, one text each."""
    texts = []
    for node in living_nodes():
        has = [f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU")]
        what = [node["Labels"].get(role_label, "no role"), *has, *["draining"][: node["NodeID"] in draining]]
        texts.append(f"{node['NodeManagerHostname']} ({', '.join(what)})")
    return texts


def living_nodes() -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = state.node_table()  # type: ignore[no-untyped-call]
    return [node for node in table if node["Alive"]]


def _known(actor: Any) -> dict[str, Any]:
    found: dict[str, Any] = state.actor_table(actor._actor_id.hex())
    return found
