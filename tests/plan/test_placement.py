"""Which node hosts what."""

from typing import Any

import pytest

from grpo.plan.placement import Node, place
from tests.plan.preflight.sites import config, node


@pytest.mark.parametrize(
    ("found", "sections", "missing"),
    [
        ([node("a", None, cpus=2)], {}, (0, 0)),
        ([node("a", None, cpus=1)], {}, (0, 1)),
        ([node("head", None, cpus=0), node("r", "rollout"), node("t", "trainer")], {"rollout": {"engines": 8}}, (0, 0)),
        ([node("r", "rollout"), node("t", "trainer")], {"rollout": {"engines": 9}}, (1, 0)),
        ([node("t", "trainer")], {}, (1, 0)),
        ([node("t", "trainer", cpus=1), node("any", None, cpus=1)], {}, (0, 0)),
        ([node("any", None, cpus=1), node("r", "rollout", cpus=1)], {}, (0, 0)),
        ([node("x", "typo", cpus=2)], {}, (0, 0)),
    ],
)
def test_every_actor_takes_a_cpu_of_a_node_that_is_not_the_other_roles(
    found: list[Node], sections: dict[str, Any], missing: tuple[int, int]
) -> None:
    assert tuple(place(config(**sections), "cpu", found).missing.values()) == missing


@pytest.mark.parametrize(
    ("gpus", "rollout", "train", "missing"),
    [
        ((4, 0), {"tensor_parallel": 2}, {"ranks": 2}, {"rollout": 0, "trainer": 0}),
        ((4, 0), {"tensor_parallel": 4}, {}, {"rollout": 0, "trainer": 1}),
        ((2, 2), {"tensor_parallel": 4}, {}, {"rollout": 1, "trainer": 0}),
        ((2, 1), {}, {"gpus_per_rank": 2}, {"rollout": 0, "trainer": 0}),
        ((1, 0), {"gpus_per_engine": 0.5}, {"gpus_per_rank": 0.5}, {"rollout": 0, "trainer": 0}),
        ((1, 0), {"gpus_per_engine": 0.6}, {"gpus_per_rank": 0.5}, {"rollout": 0, "trainer": 1}),
        (
            (2, 0),
            {"gpus_per_engine": 0.6, "engines": 2},
            {"gpus_per_rank": 0.4, "ranks": 2},
            {"rollout": 0, "trainer": 0},
        ),
    ],
)
def test_gpus_of_an_actor_are_of_one_node_and_a_share_is_of_one_gpu(
    gpus: tuple[int, int], rollout: dict[str, Any], train: dict[str, Any], missing: dict[str, int]
) -> None:
    found = [node(name, gpus=count) for name, count in zip("ab", gpus, strict=True)]
    assert place(config(rollout=rollout, train=train), "cuda", found).missing == missing
