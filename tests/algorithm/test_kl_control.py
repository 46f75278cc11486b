"""KL taken off the reward, and the controller of its coefficient, by numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.advantages import advantages
from grpo.algorithm.kl_control import KlController, with_kl_penalty
from grpo.algorithm.loss import needs_of, statistics_of
from grpo.algorithm.terms import active_terms
from grpo.config import Algorithm
from tests.algorithm.test_advantages import grouped

K1 = {"kl": "k1", "kl_coef": 0.1}


def penalised(coef: float, algorithm: Algorithm, rewards_PG: list[list[float]], kl_B: list[float]) -> list[float]:
    batch = advantages(grouped(*rewards_PG), algorithm)
    return [sample.advantage for sample in with_kl_penalty(batch, kl_B, coef, algorithm)]


def test_a_reward_loses_the_kl_of_its_completion():
    """1 - 0.2 and 0 - 0.05 have the mean 0.375; in the other group 0.6 and 1 have 0.8."""
    found = penalised(0.1, Algorithm(**K1, advantage_std="none"), [[1, 0], [1, 1]], [2.0, 0.5, 4.0, 0.0])
    assert found == pytest.approx([0.425, -0.425, -0.2, 0.2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"advantage_std": "group"}, [0.425 / 0.601141, -0.425 / 0.601141, -0.2 / 0.282943, 0.2 / 0.282943]),
        ({"advantage_std": "batch"}, [0.425 / 0.455393, -0.425 / 0.455393, -0.2 / 0.455393, 0.2 / 0.455393]),
        ({"advantage_std": "whiten"}, [0.425 / 0.383615, -0.425 / 0.383615, -0.2 / 0.383615, 0.2 / 0.383615]),
        ({"baseline": "leave_one_out"}, [0.85, -0.85, -0.4, 0.4]),
    ],
)
def test_all_ways_to_compare_see_the_penalised_reward(settings, expected):
    """Stds with N - 1: 0.601041 and 0.282843 of the groups, 0.455293 of all, 0.383515 of what is centred."""
    found = penalised(0.1, Algorithm(**K1, **settings), [[1, 0], [1, 1]], [2.0, 0.5, 4.0, 0.0])
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_penalty_for_length_stays_and_accuracy_is_what_it_was():
    algorithm = Algorithm(**K1, advantage_std="none")
    batch = advantages(grouped([1, 1]), algorithm)
    batch = [replace(batch[0], penalty=-0.5), batch[1]]
    found = with_kl_penalty(batch, [1.0, 3.0], 0.1, algorithm)
    assert [sample.advantage for sample in found] == pytest.approx([-0.15, 0.15])  # 0.4 and 0.7
    assert [(sample.reward, sample.penalty) for sample in found] == [(1, -0.5), (1, 0.0)], "what is kept is unchanged"


def test_groups_are_found_again_where_rewards_failed_and_a_prompt_comes_twice():
    """The second time the same prompt's samples begin at a lower index: those are another group."""
    algorithm = Algorithm(**K1, advantage_std="none")
    whole = grouped([1, 0, 0], [0, 1])
    again = replace(whole[1], samples=tuple(replace(sample, prompt_id="p0") for sample in whole[1].samples))
    lost = replace(whole[0], samples=(whole[0].samples[0], whole[0].samples[2]))
    batch = advantages([lost, again], algorithm)
    found = with_kl_penalty(batch, [0.0] * 4, 0.1, algorithm)
    assert [sample.advantage for sample in found] == [0.5, -0.5, -0.5, 0.5] == [sample.advantage for sample in batch]


rewards = st.sampled_from([0.0, 0.5, 1.0])


@given(st.lists(st.lists(rewards, min_size=2, max_size=4), min_size=1, max_size=4), st.floats(-5, 5))
def test_the_same_kl_of_all_changes_nothing(rewards_PG, kl):
    algorithm = Algorithm(**K1, advantage_std="whiten")
    batch = advantages(grouped(*rewards_PG), algorithm)
    found = with_kl_penalty(batch, [kl] * len(batch), 0.1, algorithm)
    assert [s.advantage for s in found] == pytest.approx([s.advantage for s in batch], abs=1e-6)


def test_k1_is_no_term_of_the_loss_but_needs_the_reference_for_every_row():
    algorithm = Algorithm(**K1)
    assert list(active_terms(algorithm)) == []
    needs = needs_of(algorithm)
    assert (needs.reference, needs.zero_advantage_rows, needs.entropy_gradient) == (True, True, False)
    assert "kl_reference" in statistics_of(algorithm)


def test_the_controller_moves_by_a_fifth_of_its_share_at_most():
    control = KlController(Algorithm(kl_coef=0.1, kl_target=0.5, kl_horizon=100))
    coefs = []
    for kl, completions in [(1.0, 50), (0.45, 100), (0.0, 1000), (0.5, 100)]:
        control.update(kl, completions)
        coefs.append(control.coef)
    assert coefs == pytest.approx([0.11, 0.099, 0.0792, 0.0792])  # x 1.1, x 0.9, x 0.8, x 1


def test_without_a_target_the_coefficient_stays():
    control = KlController(Algorithm(kl_coef=0.1))
    control.update(1e9, 1000)
    assert control.coef == 0.1


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6)), max_size=20))
def test_a_coefficient_stays_a_positive_number(steps):
    control = KlController(Algorithm(kl_coef=0.1, kl_target=0.01, kl_horizon=50))
    for kl, completions in steps:
        before = control.coef
        control.update(kl, completions)
        assert 0.8 * before - 1e-12 <= control.coef <= 1.2 * before + 1e-12
    assert 0.0 < control.coef < math.inf
