"""How prompts are shared among engines."""

import itertools
from concurrent.futures import Future
from pathlib import Path

import pytest

from grpo.cluster.fleet import Fleet, State
from grpo.cluster.rollouts import FleetRollouts, request_seed
from grpo.errors import ClusterError, DataError, EngineLost
from grpo.interfaces import Call
from grpo.types import Group, Prompt, Sampling
from tests.cluster.local import LocalEngine, LocalHead, make_context

SAMPLING = Sampling(2, 8, 1.0, 1.0)
PROMPTS = [Prompt(f"p:{n}", "q", "a", (1,)) for n in range(5)]


def make_rollouts(tmp_path: Path, events: list[str], versions: list[int]) -> tuple[FleetRollouts, Fleet]:
    """Two engines of version 0; `versions` are what `ensure` answers, one after the other, the last for ever."""
    context = make_context(tmp_path, [], rollout={"engines": 2})
    fleet = Fleet(context, lambda index: LocalEngine(index, events, {}))

    def ensure() -> int:
        version = versions.pop(0) if len(versions) > 1 else versions[0]
        fleet.gather(wait=True)
        fleet.verified()
        for slot in fleet.slots:
            assert isinstance(slot.engine, LocalEngine)
            slot.engine.version = version
        return version

    return FleetRollouts(context, fleet, ensure), fleet


def test_engines_share_prompts_and_the_answers_come_in_their_order(tmp_path: Path) -> None:
    events: list[str] = []
    rollouts, _ = make_rollouts(tmp_path, events, [0])
    groups = rollouts.generate(PROMPTS, SAMPLING, step=1)
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert [event for event in events if "generate" in event] == ["engine 0 generate 3", "engine 1 generate 2"]


@pytest.mark.parametrize("lost", [EngineLost("engine 1 died"), ClusterError("engine 1 lost its connection")])
def test_the_share_of_a_lost_engine_goes_to_the_others(tmp_path: Path, lost: ClusterError) -> None:
    events: list[str] = []
    rollouts, fleet = make_rollouts(tmp_path, events, [0])
    engine = fleet.slots[1].engine
    assert isinstance(engine, LocalEngine)
    engine.fails["generate"] = lost
    groups = rollouts.generate(PROMPTS, SAMPLING, step=1)
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert [event for event in events if "generate" in event][2:] == ["engine 0 generate 2"], "at once, beside its own"
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY, State.RESTARTING]


def test_an_engine_whose_node_is_about_to_go_hands_its_share_to_the_others_at_once(tmp_path: Path) -> None:
    events: list[str] = []
    rollouts, fleet = make_rollouts(tmp_path, events, [0])
    rollouts.ensure()
    leaving = fleet.slots[1].engine
    assert isinstance(leaving, LocalEngine)
    leaving.node_id = "spot"
    head = rollouts.context.workers.head
    assert isinstance(head, LocalHead)

    def never(requests: object, sampling: object) -> Call[list[Group]]:
        head.draining = frozenset({"spot"})
        return Call(leaving, Future())

    leaving.generate = never  # type: ignore[method-assign]
    groups = rollouts.generate(PROMPTS, SAMPLING, step=1)
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert str(leaving.lost) == "engine 1 leaves: its node is about to go away"
    assert rollouts.context.recoveries.spent == 0


def test_a_batch_is_of_one_version_if_all_were_lost_and_the_new_ones_are_newer(tmp_path: Path) -> None:
    rollouts, fleet = make_rollouts(tmp_path, [], [0, 3])
    engine = fleet.slots[0].engine
    assert isinstance(engine, LocalEngine)
    engine.fails["generate"] = EngineLost("engine 0 died")
    groups = rollouts.generate(PROMPTS, SAMPLING, step=4)
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert len({sample.versions for group in groups for sample in group.samples}) == 1


def test_an_error_that_is_no_loss_is_raised(tmp_path: Path) -> None:
    rollouts, fleet = make_rollouts(tmp_path, [], [0])
    engine = fleet.slots[1].engine
    assert isinstance(engine, LocalEngine)
    engine.fails["generate"] = DataError("prompt p:1 has 900 tokens")
    with pytest.raises(DataError, match="p:1"):
        rollouts.generate(PROMPTS, SAMPLING, step=1)


def test_request_seeds_differ_by_run_step_place_and_prompt_and_leave_room_for_samples() -> None:
    keys = itertools.product(range(3), range(20), range(2), ("a:1", "a:2"))
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == 3 * 20 * 2 * 2
    assert request_seed(1, 2, 3, "a:1") == request_seed(1, 2, 3, "a:1")
    assert all(0 <= seed < 2**31 - 2**16 for seed in seeds)
