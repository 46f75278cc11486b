"""Which node hosts what."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.plan import placement
from grpo.plan.placement import Node, cpus_alone, crowded, grouped, place, refusal, room_for_engines, with_engines
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
            (1, 1),
            {"gpus_per_engine": 0.5, "engines": 2},
            {"gpus_per_rank": 0.5, "ranks": 2},
            {"rollout": 0, "trainer": 0},
        ),
        ((1, 0), {"gpus_per_engine": 0.1}, {"gpus_per_rank": 0.1, "ranks": 2}, {"rollout": 0, "trainer": 1}),
        ((2, 1), {"tensor_parallel": 2}, {"gpus_per_rank": 0.5}, {"rollout": 0, "trainer": 0}),
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


def members(wanted: Any, mixed: bool = True) -> list[str]:
    """One word for each shared GPU: t0r1r2 is rank 0 with engines 1 and 2."""
    groups = grouped(wanted, "cuda", mixed)
    return ["".join(f"{role[0]}{index}" for role, index in group.members) for group in groups]


@pytest.mark.parametrize(
    ("engines", "ranks", "mixed", "expected"),
    [
        ((2, 0.5), (2, 0.5), True, ["t0r0", "t1r1"]),
        ((2, 0.5), (2, 0.5), False, ["t0", "t1", "r0r1"]),
        ((3, 0.25), (2, 0.5), True, ["t0r0r2", "t1r1"]),
        ((5, 0.33), (1, 0.33), True, ["t0r0r1", "r2r3r4"]),
        ((3, 0.5), (1, 1), True, ["t0", "r0r1", "r2"]),
        ((1, 1), (2, 0.01), True, ["r0", "t0", "t1"]),
        ((2, 1.0), (2, 1.0), True, ["r0", "r1", "t0", "t1"]),
    ],
)
def test_who_shares_a_gpu(engines: Any, ranks: Any, mixed: bool, expected: list[str]) -> None:
    rollout = {"engines": engines[0], "gpus_per_engine": engines[1]}
    train = {"ranks": ranks[0], "gpus_per_rank": ranks[1]}
    assert members(config(rollout=rollout, train=train), mixed) == expected


@pytest.mark.parametrize(("several", "expected"), [(1, ["t0r0", "t1r1"]), (2, ["t0r0r2", "t1r1r3"])])
def test_in_turns_every_gpu_has_a_rank_and_its_engines(several: int, expected: list[str]) -> None:
    rollout = {"engines": 2 * several, "engines_per_gpu": several}
    wanted = config(rollout=rollout, train={"ranks": 2}, cluster={"colocate": True})
    assert members(wanted, True) == expected
    apart = [node("r", "rollout", gpus=2), node("t", "trainer", gpus=2)]
    assert "must find their places on 4 GPUs, but" in refusal(wanted, "cuda", apart), "not on GPUs of their own"
    assert refusal(wanted, "cuda", [node("a", gpus=2)]) == ""
    alone = [group.members for group in grouped(wanted, "cuda", roles=("rollout",))]
    assert [len(members) for members in alone] == [several, several], "an evaluation has engines alone"


@given(st.integers(1, 9), st.integers(1, 100), st.integers(1, 9), st.integers(1, 100), st.booleans())
def test_every_actor_has_one_place_no_gpu_is_overfull_and_ranks_are_apart(
    engines: int, engine: int, ranks: int, rank: int, mixed: bool
) -> None:
    share = {"rollout": engine / 100, "trainer": rank / 100}
    wanted = config(
        rollout={"engines": engines, "gpus_per_engine": share["rollout"]},
        train={"ranks": ranks, "gpus_per_rank": share["trainer"]},
    )
    groups = grouped(wanted, "cuda", mixed)
    everyone = [member for group in groups for member in group.members]
    assert sorted(everyone) == sorted([("rollout", i) for i in range(engines)] + [("trainer", i) for i in range(ranks)])
    for group in groups:
        assert group.gpus == 1 and group.count("trainer") <= 1
        assert sum(share[role] for role, _ in group.members) <= 1 + 1e-6
        assert mixed or len({role for role, _ in group.members}) == 1


def test_labelled_nodes_keep_the_roles_apart() -> None:
    wanted = config(rollout={"engines": 2, "gpus_per_engine": 0.5}, train={"ranks": 2, "gpus_per_rank": 0.5})
    found = [node("r", "rollout", gpus=1), node("t", "trainer", gpus=2)]
    assert place(wanted, "cuda", found).missing == {"rollout": 0, "trainer": 0}
    assert refusal(wanted, "cuda", found) == ""


def test_a_refusal_names_layout_and_reason() -> None:
    halves = {"rollout": {"gpus_per_engine": 0.5}, "train": {"ranks": 2, "gpus_per_rank": 0.5}}
    assert refusal(config(**halves), "cuda", [node("a", gpus=1)]) == (
        "1 x engine with 0.5 GPU each and 2 x trainer rank with 0.5 GPU each must find their places on 1 GPUs, but "
        "1 x trainer rank has none (a share is of one GPU, and two ranks never share one): lower train.ranks, "
        "rollout.engines, train.gpus_per_rank or rollout.gpus_per_engine"
    )


@pytest.mark.parametrize("several", range(2, 17))
def test_engines_per_gpu_fill_whole_gpus_and_each_has_a_seat(several: int) -> None:
    wanted = config(rollout={"engines": 2 * several, "engines_per_gpu": several}, train={"ranks": 2})
    groups = [group for group in grouped(wanted, "cuda") if group.count("rollout")]
    assert [group.count("rollout") for group in groups] == [several, several]
    assert all(group.gpus == 1 and not group.count("trainer") for group in groups)
    for group in groups:
        assert [group.seat(role, index) for role, index in group.members] == list(range(several))
    assert crowded(wanted, "cuda") == ""
    assert sum(group.gpus for group in grouped(wanted, "cuda")) == 4


def test_a_rank_has_no_seat_among_the_engines_beside_it() -> None:
    (group,) = grouped(config(rollout={"engines": 2, "gpus_per_engine": 0.3}, train={"gpus_per_rank": 0.4}), "cuda")
    assert [group.seat(*member) for member in group.members] == [0, 0, 1]


def test_a_refusal_names_the_knob_that_is_used() -> None:
    wanted = config(rollout={"engines": 4, "engines_per_gpu": 2})
    text = refusal(wanted, "cuda", [node("a", gpus=2)])
    assert "rollout.engines or train.gpus_per_rank, or raise rollout.engines_per_gpu" in text
    assert "gpus_per_engine" not in text


@pytest.mark.parametrize(("memory", "refused"), [(0.9, True), (0.5, True), (0.49, False)])
def test_engines_on_one_gpu_must_have_room_there(memory: float, refused: bool) -> None:
    rollout = {"engines": 2, "gpus_per_engine": 0.5, "memory_utilization": memory}
    text = crowded(config(rollout=rollout), "cuda")
    assert ("2 engines share a GPU" in text and "lower that below 0.5" in text) == refused
    assert crowded(config(rollout=rollout), "cpu") == ""


def test_an_evaluation_needs_no_gpu_for_ranks() -> None:
    wanted = config(train={"ranks": 8})
    assert refusal(wanted, "cuda", [node("a", gpus=1)]) != ""
    assert refusal(wanted, "cuda", [node("a", gpus=1)], ["rollout"]) == ""
    halves = config(rollout={"engines": 2, "gpus_per_engine": 0.5, "memory_utilization": 0.4}, train={"ranks": 8})
    assert refusal(halves, "cuda", [node("a", gpus=1)], ["rollout"]) == ""


def test_how_many_of_the_engines_that_may_come_find_room() -> None:
    wanted = config(rollout={"engines": {"min": 1, "max": 4}}, train={"ranks": 2})
    assert [room_for_engines(wanted, "cuda", [node("a", gpus=gpus)]) for gpus in (3, 4, 8)] == [1, 2, 4]
    shared = config(rollout={"engines": {"min": 2, "max": 6}, "engines_per_gpu": 2}, train={"ranks": 2})
    assert [room_for_engines(shared, "cuda", [node("a", gpus=gpus)]) for gpus in (3, 4, 8)] == [2, 4, 6]
    assert members(with_engines(shared, 4)) == ["t0", "t1", "r0r1", "r2r3"], "that share a GPU they come together"


@pytest.mark.parametrize(
    ("engines", "cores", "cpus", "found"),
    [(1, 2, 3, 1), (5, 2, 7, 5), ({"min": 1, "max": 2}, 2, 4, 2), ({"min": 3, "max": 9}, 2, 5, 3)]
    + [({"min": 1, "max": 10_000}, 16, 18, 16), ({"min": 1, "max": 4}, 16, 16, 4)],
)
def test_a_machine_on_its_own_starts_no_more_spare_engines_than_it_has_cores(engines, cores, cpus, found) -> None:
    wanted = config(rollout={"engines": engines}, train={"ranks": 2})
    assert cpus_alone(wanted, cores) == cpus
    assert room_for_engines(wanted, "cpu", [node("a", None, cpus=cpus_alone(wanted, cores))]) == found


@pytest.mark.parametrize(("device", "gpus", "found"), [("cpu", 0, 15), ("cuda", 8, 7)])
def test_no_number_of_engines_is_tried_that_the_nodes_cannot_hold(monkeypatch, device, gpus, found) -> None:
    tried = []
    whole = placement.place
    monkeypatch.setattr(placement, "place", lambda config, *rest: tried.append(config) or whole(config, *rest))
    wanted = config(rollout={"engines": {"min": 1, "max": 10_000}})
    assert room_for_engines(wanted, device, [node("a", cpus=16, gpus=gpus)]) == found
    assert len(tried) <= 2, "each takes as long as there are engines"
    assert room_for_engines(wanted, device, []) == 1
