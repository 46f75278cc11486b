"""Advantages: the numbers of TRL's `scale_rewards` and their properties."""

from dataclasses import replace
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


def compared(groups, **algorithm):
    return [sample.advantage for sample in advantages(groups, Algorithm.model_validate(algorithm))]


def test_leave_one_out_as_in_the_shared_fixture():
    """RLOO: 1 - 1/3 and 0 - 2/3, with no std unless another one is named."""
    assert compared(grouped([1, 0, 0, 1]), baseline="leave_one_out") == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert compared(grouped([3, 0]), baseline="leave_one_out") == [3.0, -3.0]
    assert compared(grouped([0.1] * 3, [7.0]), baseline="leave_one_out") == [0.0] * 4


def test_whiten_divides_by_the_std_of_what_is_centred():
    """Centred +-1/2 and 1/4 x3, -3/4: squares 1 + 3/4 over 7 are 1/4, so the std is 1/2."""
    expected = [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]
    found = values("whiten", [1, 0, 0, 1], [1, 1, 1, 0])
    assert found == pytest.approx([value / 0.5001 for value in expected])
    away = values("whiten", [11, 10, 10, 11], [1, 1, 1, 0])
    assert away == pytest.approx(found), "unlike the std of all rewards, it does not see how groups differ"
    assert values("batch", [11, 10, 10, 11], [1, 1, 1, 0])[0] < 0.11


def test_leave_one_out_can_be_whitened():
    """2 (R - mean) in groups of two: +-1 and +-2, whose squares 10 over 3 give a std of 1.825742."""
    found = compared(grouped([1, 0], [2, 0]), baseline="leave_one_out", advantage_std="whiten")
    assert found == pytest.approx([value / 1.825842 for value in (1, -1, 2, -2)], rel=1e-6)


def of_parts(*parts_PG):
    """Groups of several rewards: of each sample (weight, reward) by reward."""
    groups = []
    for group, parts_G in zip(grouped(*[[0.0] * len(parts_G) for parts_G in parts_PG]), parts_PG, strict=True):
        samples = [
            replace(sample, parts=tuple(parts), reward=sum(weight * reward for weight, reward in parts))
            for sample, parts in zip(group.samples, parts_G, strict=True)
        ]
        groups.append(Group(group.prompt, tuple(samples)))
    return groups


GDPO = {"reward_combination": "normalise_then_sum"}


def test_rewards_normalised_then_summed_by_weight_then_whitened():
    """Each reward is +-1 / sqrt(2) over its own std: 1 of 0..1 counts as 100 of 0..100, and half the weight as half."""
    rows = [[(1.0, 1.0), (0.5, 0.0)], [(1.0, 0.0), (0.5, 100.0)]]
    one, other = 0.5 / (0.5**0.5 + 1e-4), 50.0 / (5000.0**0.5 + 1e-4)
    total = one - 0.5 * other
    scale = (2 * total**2) ** 0.5 + 1e-4
    assert compared(of_parts(rows), **GDPO) == pytest.approx([total / scale, -total / scale])
    assert compared(of_parts(rows))[0] < 0.0, "as one sum the large reward decides"


def test_equal_sums_of_other_parts_teach_where_rewards_are_compared_apart():
    """Rare rewards weigh more: (1, 0) stands against (0, 1) three times."""
    rows = [[(1.0, 1.0), (2.0, 0.0)]] + [[(1.0, 0.0), (2.0, 0.5)]] * 3
    group = of_parts(rows)
    assert compared(group, advantage_std="none") == [0.0] * 4 and not group[0].zero_variance
    high = compared(group, **GDPO)
    totals = [0.75 / 0.5001 - 2 * 0.375 / 0.2501] + [-0.25 / 0.5001 + 2 * 0.125 / 0.2501] * 3
    scale = spread(totals) + 1e-4
    assert high == pytest.approx([total / scale for total in totals])
    assert of_parts([[(1.0, 1.0), (2.0, 0.5)]] * 3)[0].zero_variance


def test_the_sum_is_whitened_over_the_whole_batch():
    first = [[(1.0, 1.0)], [(1.0, 0.0)]]
    second = [[(3.0, 1.0)], [(3.0, 0.0)]]
    unit = 0.5 / (0.5**0.5 + 1e-4)
    scale = spread([unit, -unit, 3 * unit, -3 * unit]) + 1e-4
    expected = [value * unit / scale for value in (1, -1, 3, -3)]
    assert compared(of_parts(first, second), **GDPO) == pytest.approx(expected)


def test_samples_that_were_drawn_without_parts_have_one_reward():
    groups = grouped([1, 0, 0, 1])
    alone = of_parts([[(1.0, 1.0)], [(1.0, 0.0)], [(1.0, 0.0)], [(1.0, 1.0)]])
    assert compared(groups, **GDPO) == compared(alone, **GDPO) != [0.0] * 4
