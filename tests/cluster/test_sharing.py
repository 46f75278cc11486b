"""Actors that share GPUs, on real Ray with GPUs that are only counted."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from grpo.cluster.nodes import ray_nodes
from grpo.cluster.session import Session, session
from grpo.cluster.sharing import SharedGpus
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.plan.placement import ROLES, Node, actors, gpus_of, place
from grpo.run.stopping import StopRequest
from tests.cluster.actors import Actor, make_config

GPUS = 3
SECONDS = 60


def cuda(run_dir: Path, engines: int, each_engine: float, ranks: int, each_rank: float) -> Config:
    return make_config(
        run_dir,
        cluster={"device": "cuda", "environment": ["RAY_OVERRIDE_RESOURCES"]},
        rollout={"engines": engines, "gpus_per_engine": each_engine, "memory_utilization": 0.2},
        train={"ranks": ranks, "gpus_per_rank": each_rank},
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A machine with three GPUs and room for 12 actors."""
    with pytest.MonkeyPatch.context() as patch, StopRequest(30) as stop:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"GPU": GPUS, "CPU": 12}))
        with session(cuda(tmp_path_factory.mktemp("three"), 2, 0.5, 2, 0.5), stop) as current:
            yield current


def where(current: Session, config: Config) -> dict[str, list[int]]:
    """The GPUs that each actor of the layout gets, engines last: Ray alone would fill the first GPU with ranks."""
    current.shared = SharedGpus(place(config, "cuda", ray_nodes(config)).groups, current.selector)
    made = {
        f"{role} {index}": current.place(Actor, role, gpus_of(config, role), None, index, "cuda")[0]
        for role in reversed(ROLES)
        for index in range(actors(config, role))
    }
    try:
        return dict(zip(made, ray.get([actor.gpus.remote() for actor in made.values()], timeout=SECONDS), strict=True))
    finally:
        for actor in made.values():
            ray.kill(actor)
        for group in current.shared._made.values():
            remove_placement_group(group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "ranks_beside"),
    [
        ((2, 0.5, 2, 0.5), [1, 1]),
        ((4, 0.33, 2, 0.33), [1, 1, 1, 1]),
        ((2, 0.6, 1, 0.4), [1, 0]),
        ((1, 1, 2, 0.5), [0]),
    ],
)
def test_ranks_have_a_gpu_each_and_engines_the_rest_of_them(
    three: Session, tmp_path: Path, layout: tuple[int, float, int, float], ranks_beside: list[int]
) -> None:
    """`ranks_beside`: of each engine, the ranks on its GPU."""
    got = where(three, cuda(tmp_path, *layout))
    ranks = [gpu for name, gpus in got.items() if name.startswith("trainer") for gpu in gpus]
    assert len(ranks) == len(set(ranks)) == layout[2] * max(1, int(layout[3]))
    assert [sum(ranks.count(gpu) for gpu in gpus) for name, gpus in got.items() if "rollout" in name] == ranks_beside
    load = [0.0] * GPUS
    for name, gpus in got.items():
        for gpu in gpus:
            load[gpu] += min(1, layout[1] if "rollout" in name else layout[3])
    assert max(load) <= 1


@pytest.mark.parametrize(
    ("labels", "lanes"), [((None, None), [0, 0]), (("rollout", "trainer"), [0, 1])], ids=["beside ranks", "apart"]
)
def test_engines_on_the_same_gpu_are_on_different_lanes(
    labels: tuple[str | None, str | None], lanes: list[int], tmp_path: Path
) -> None:
    """By the layout that the nodes allow: NCCL takes a GPU once in each group."""
    nodes = [Node(str(n), str(n), "", label, cpus=8, gpus=2) for n, label in enumerate(labels)]
    config = cuda(tmp_path, 2, 0.5, 2, 0.5)
    shared = SharedGpus(place(config, "cuda", nodes).groups, lambda role, index: {})
    assert [shared.lane("rollout", index) for index in range(2)] == lanes
    whole = cuda(tmp_path, 2, 2, 2, 1)
    assert SharedGpus(place(whole, "cuda", nodes).groups, lambda role, index: {}).lane("rollout", 1) == 0


@pytest.mark.slow
def test_an_actor_that_is_replaced_comes_to_the_same_gpu_unless_its_node_goes(three: Session, tmp_path: Path) -> None:
    config = cuda(tmp_path, 2, 0.5, 2, 0.5)
    shared = SharedGpus(place(config, "cuda", ray_nodes(config)).groups, three.selector)
    first = shared.strategy("rollout", 1, frozenset())
    again = shared.strategy("trainer", 1, frozenset())
    assert first and again and first.placement_group == again.placement_group
    ray.get(first.placement_group.ready(), timeout=SECONDS)
    moved = shared.strategy("rollout", 1, frozenset({node.id for node in ray_nodes(config)}))
    assert moved and moved.placement_group != first.placement_group
    for group in (first.placement_group, moved.placement_group):
        remove_placement_group(group)


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_an_actor_waits(three: Session, tmp_path: Path) -> None:
    three_before = three.config
    try:
        three.config = cuda(tmp_path, 1, 0.5, 4, 0.25)
        with pytest.raises(ConfigError, match="4 x trainer rank with 0.25 GPU each must find their places on 3 GPUs"):
            three._plan_places()
    finally:
        three.config = three_before
