"""Handles and the actors behind them have the same verbs."""

import inspect

import pytest

from grpo.cluster.actor_protocols import EngineActor, RankActor
from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.handles import RayEngine, RayRank
from grpo.interfaces import Engine, TrainerRank
from tests.chaos.actors import FakeEngineActor, FakeRankActor

BESIDE = {"end", "stacks", "wanted_node", "node_is_lost"}
"""Of a Worker; what the driver does itself."""


def verbs(kind: type) -> dict[str, list[str]]:
    """Public methods and the names of their parameters."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: [*inspect.signature(method).parameters] for name, method in found if name[0] != "_"}


@pytest.mark.parametrize(
    ("seen", "handle", "actor", "classes"),
    [
        (Engine, RayEngine, EngineActor, (VLLMActor, FakeEngineActor)),
        (TrainerRank, RayRank, RankActor, (PolicyModelActor, FakeRankActor)),
    ],
)
def test_verbs_are_the_same_all_the_way(seen: type, handle: type, actor: type, classes: tuple[type, ...]) -> None:
    wanted = {name: parameters for name, parameters in verbs(seen).items() if name not in BESIDE}
    assert len(wanted) > 8
    for kind in (handle, actor, *classes):
        assert {name: verbs(kind).get(name) for name in wanted} == wanted, kind
    assert verbs(actor) == wanted
