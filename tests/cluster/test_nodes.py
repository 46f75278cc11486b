"""What an actor asks of its own node."""

from types import SimpleNamespace
from typing import Any

import pytest

from grpo.cluster import nodes
from grpo.cluster.nodes import on_my_node
from grpo.config import Config


def config(address: str | None) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "cluster": {"address": address}})


@pytest.mark.parametrize(
    ("address", "cpus", "together"),
    [
        (None, 1.0, 6),  # a Ray of our own: all are on this machine
        ("auto", 1.0, 1),  # a pod of one engine
        ("auto", 4.0, 4),
        ("auto", 64.0, 6),
        ("auto", 0.5, 1),
        ("auto", None, 6),  # Ray's head does not know the node
    ],
)
def test_actors_share_the_cores_of_their_node_with_as_many_as_it_may_hold(
    monkeypatch: pytest.MonkeyPatch, address: str | None, cpus: float | None, together: int
) -> None:
    def known() -> list[dict[str, Any]]:
        mine = [] if cpus is None else [{"NodeID": "mine", "Resources": {"CPU": cpus}}]
        return [{"NodeID": "head", "Resources": {}}, {"NodeID": "other", "Resources": {"CPU": 3.0}}, *mine]

    monkeypatch.setattr(nodes, "living_nodes", known)
    monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    assert on_my_node(config(address), 6) == together
