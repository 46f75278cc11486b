"""Intervals of scores: known numbers, and that they hold what they promise."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.intervals import bootstrap, full_passes, interval, judged, wilson
from grpo.config import Config
from grpo.rewards.gsm8k import final_number
from tests.runs import make_group


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_of_the_literature(right: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, and the rule of 0 and n."""
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_bounds_lie_around_the_mean(values: list[float]) -> None:
    low, high = interval(values)
    assert 0 <= low <= sum(values) / len(values) + 1e-9 and sum(values) / len(values) <= high + 1e-9 <= 1 + 1e-6


def test_the_bootstrap_is_as_wide_as_the_normal_interval_and_the_same_each_time() -> None:
    values = [random.Random(row).random() for row in range(1000)]
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * (1 / 12 / 1000) ** 0.5, rel=0.1)
    assert bootstrap(values) == (low, high)


def test_an_evaluation_has_intervals_of_what_is_a_mean_of_prompts() -> None:
    groups = [make_group([1.0, 0.0, 0.0, 1.0], row=0), make_group([0.0] * 4, row=1), make_group([1.0] * 4, row=2)]
    found = judged("sampled", groups, final_number)
    assert (found.prompts, found.samples) == (3, 4)
    assert found.scores["eval/accuracy"] == pytest.approx(0.5)
    assert set(found.intervals) == {"eval/accuracy", "eval/pass@2", "eval/pass@4", "eval/maj@4"}
    assert found.intervals["eval/pass@4"] == wilson(2, 3)
    low, high = found.intervals["eval/accuracy"]
    assert low < 0.5 < high


def test_what_a_whole_evaluation_is() -> None:
    sections = {"model": {"path": "x"}, "data": {"source": "x.jsonl"}, "eval": {"temperature": 0, "prompts": 3}}
    config = Config.model_validate(sections)
    greedy, sampled = full_passes(config).values()
    assert (greedy.samples_per_prompt, greedy.temperature) == (1, 0.0)
    assert (sampled.samples_per_prompt, sampled.temperature) == (8, 1.0)
