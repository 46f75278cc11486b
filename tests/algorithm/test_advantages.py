"""Advantages: the numbers of TRL's `scale_rewards` and their properties."""

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.advantages import advantages, spread
from grpo.config import Algorithm
from grpo.types import Group, Prompt, Sample


def grouped(*rewards_PG):
    groups = []
    for row, rewards_G in enumerate(rewards_PG):
        prompt = Prompt(f"p{row}", "q", "a", (1,))
        samples = [Sample(prompt.id, i, (1,), (2,), (0.0,), ((0, 0),), "stop", "t", r) for i, r in enumerate(rewards_G)]
        groups.append(Group(prompt, tuple(samples)))
    return groups


def values(std, *rewards_PG):
    return [sample.advantage for sample in advantages(grouped(*rewards_PG), Algorithm(advantage_std=std))]


def test_group_std_as_in_the_shared_fixture():
    high = 0.86587543
    assert values("group", [1, 0, 0, 1]) == pytest.approx([high, -high, -high, high], abs=1e-8)


def test_no_std_is_the_centred_reward():
    assert values("none", [1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]


def test_batch_std_as_in_trl():
    expected = [0.965905, -0.965905, -0.965905, 0.965905, 0.482953, 0.482953, 0.482953, -1.448858]
    assert values("batch", [1, 0, 0, 1], [1, 1, 1, 0]) == pytest.approx(expected, abs=1e-6)


def test_samples_are_flattened_in_order_and_keep_everything_else():
    groups = grouped([1, 0], [0, 1], [1, 1])
    batch = advantages(groups, Algorithm(advantage_std="none"))
    assert [(s.prompt_id, s.index) for s in batch] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1)]
    assert [sample.reward for sample in batch] == [1, 0, 0, 1, 1, 1]
    assert groups[0].samples[0].advantage is None  # records are frozen; the batch holds new ones


def test_a_group_that_lost_samples_is_compared_with_what_is_left_of_it():
    assert values("none", [1, 0, 0, 1], [1, 0], [3, 0, 0]) == [0.5, -0.5, -0.5, 0.5, 0.5, -0.5, 2.0, -1.0, -1.0]
    half = 0.5 / (0.5**0.5 + 1e-4)
    assert values("group", [1, 0]) == pytest.approx([half, -half])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(std):
    assert values(std, [0.1] * 3, [0.7] * 7, [1 / 3] * 5, [1.0]) == [0.0] * 16
    assert values(std) == []


def test_spread_divides_by_n_minus_one():
    assert spread([1.0, 0.0, 0.0, 1.0]) == pytest.approx((1 / 3) ** 0.5)
    assert spread([5.0]) == spread([]) == 0.0


def test_unscored_groups_are_refused():
    with pytest.raises(AssertionError, match="p0 is not scored yet"):
        values("group", [None, 1.0])


rewards = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e3, 1e3))
groups_of_rewards = st.lists(st.lists(rewards, min_size=2, max_size=8), min_size=1, max_size=5)
any_std = st.sampled_from(["group", "batch", "none"])


@given(groups_of_rewards, any_std)
def test_sums_to_zero_in_each_group_and_keeps_the_order(rewards_PG, std):
    batch = iter(values(std, *rewards_PG))
    for rewards_G in rewards_PG:
        advantages_G = [next(batch) for _ in rewards_G]
        assert fmean(advantages_G) == pytest.approx(0.0, abs=1e-6)
        for one, other in zip(rewards_G, advantages_G, strict=True):
            for reward, advantage in zip(rewards_G, advantages_G, strict=True):
                assert reward >= one if advantage > other else True
                assert reward != one or advantage == other


@given(groups_of_rewards, any_std, st.sampled_from([-8.0, 0.5, 64.0]))
def test_a_shift_of_all_rewards_changes_nothing(rewards_PG, std, shift):
    shifted_PG = [[reward + shift for reward in rewards_G] for rewards_G in rewards_PG]
    assert values(std, *shifted_PG) == pytest.approx(values(std, *rewards_PG), abs=1e-6)


@given(st.lists(rewards, min_size=2, max_size=8))
def test_group_advantages_are_bounded(rewards_G):
    """No sample can be more than (G - 1) / sqrt(G) standard deviations (N - 1) away from the mean."""
    bound = (len(rewards_G) - 1) / len(rewards_G) ** 0.5
    assert all(abs(advantage) <= bound + 1e-9 for advantage in values("group", rewards_G))
