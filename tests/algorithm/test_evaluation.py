"""Evaluation: pass@1, unbiased pass@k, maj@k."""

from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.evaluation import majority, pass_at_k, score_evaluation
from grpo.types import Group, Prompt, Sample

FINISH = {False: "stop", True: "length"}


def grouped(*groups):
    """Groups of (text, reward) pairs; a completion has one token for each character and is cut at 12."""
    out = []
    for row, pairs in enumerate(groups):
        samples = [
            Sample(
                f"p{row}",
                i,
                (1,),
                (2,) * len(text),
                (0.0,) * len(text),
                ((0, 0),),
                FINISH[len(text) >= 12],
                text,
                reward,
            )
            for i, (text, reward) in enumerate(pairs)
        ]
        out.append(Group(Prompt(f"p{row}", "q", "a", (1,)), tuple(samples)))
    return out


def test_all_scores_of_two_prompts_with_four_samples():
    scores = score_evaluation(
        grouped(
            [("#### 3", 0.0), ("#### 42", 1.0), ("#### 42.00", 1.0), ("#### 5", 0.0)],
            [("#### 7", 1.0), ("#### 8", 0.0), ("#### 8.", 0.0), ("never said a", 0.0)],
        )
    )
    assert scores == pytest.approx(
        {
            "eval/accuracy": 3 / 8,
            "eval/pass@2": (5 / 6 + 3 / 6) / 2,
            "eval/pass@4": 1.0,
            "eval/maj@4": 0.5,
            "eval/reward": 3 / 8,
            "eval/completion_tokens": (6 + 7 + 10 + 6 + 6 + 6 + 7 + 12) / 8,
            "eval/truncated_ratio": 1 / 8,
        }
    )


def test_one_sample_has_neither_pass_at_k_nor_majority():
    scores = score_evaluation(grouped([("#### 1", 1.0)], [("#### 2", 0.5)]))
    assert scores == {
        "eval/accuracy": 0.5,
        "eval/reward": 0.75,
        "eval/completion_tokens": 6.0,
        "eval/truncated_ratio": 0.0,
    }


def test_six_samples_have_pass_at_2_and_4_and_majority_of_6():
    scores = score_evaluation(grouped([("#### 1", 1.0)] * 6))
    assert [key for key in scores if "@" in key] == ["eval/pass@2", "eval/pass@4", "eval/maj@6"]


def test_no_groups_no_scores():
    assert score_evaluation([]) == {}


def test_a_reward_of_at_least_one_is_right():
    scores = score_evaluation(grouped([("a", 1.5)], [("a", 1.0)], [("a", 0.999)], [("a", -1.0)]))
    assert scores["eval/accuracy"] == 0.5


def test_a_prompt_that_lost_samples_counts_with_those_that_are_left():
    scores = score_evaluation(
        grouped(
            [("#### 1", 1.0), ("#### 2", 0.0), ("#### 2", 0.0), ("#### 1", 1.0)],
            [("#### 2", 0.0), ("#### 1", 1.0), ("#### 2", 0.0)],
            [("#### 1", 1.0)],
        )
    )
    assert scores["eval/accuracy"] == pytest.approx((2 / 4 + 1 / 3 + 1) / 3)
    assert scores["eval/pass@2"] == pytest.approx(((1 - 1 / 6) + (1 - 1 / 3)) / 2)
    assert scores["eval/pass@4"] == 1.0
    assert scores["eval/maj@4"] == pytest.approx(2 / 3)
    assert scores["eval/reward"] == pytest.approx(4 / 8)


@pytest.mark.parametrize(
    ("texts", "index"),
    [
        (["#### 1", "#### 2", "#### 2"], 1),
        (["#### 1", "#### 2", "#### 2.0", "#### 1.00"], 0),  # a tie: the first to appear
        (["nothing", "nothing", "nothing", "#### 2"], 3),  # no answer, no vote
        (["#### 0", "#### 1", "#### 0.0"], 0),  # zero is an answer
        (["\\boxed{3}", "\\boxed{4}", "so \\boxed{4.0}"], 1),
        (["blue", "red", " red\n"], 1),  # no numbers at all: the texts vote
    ],
)
def test_majority(texts, index):
    samples = grouped([(text, 0.0) for text in texts])[0].samples
    assert majority(samples).index == index


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_draws(case):
    n, right, k = case
    draws = combinations([1] * right + [0] * (n - right), k)
    assert pass_at_k(n, right, k) == pytest.approx(fmean(max(draw) for draw in draws))
