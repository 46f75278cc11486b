import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.correction import CORRECTIONS, NONE, Bounds
from grpo.algorithm.inputs import Normaliser
from grpo.algorithm.mismatch import DIFFERENCES, FURTHEST, WEIGHTS, Mismatch, figures, measure, quantile
from tests.algorithm.test_loss import ALL, NEW_MINUS_OLD, OLD, OLD_MINUS_SAMPLER, flat, inputs

LENGTHS = [3, 2, 1, 2]
W = [2.459603, 0.951229, 1.020201, 0.904837, 1.010050, 1.0, 0.367879, 1.030455]
PRODUCTS = [2.386911, 0.913931, 1.0, 0.379083]


def fixture(bounds: Bounds = NONE, **more: float) -> dict[str, float]:
    start_C, sampler_C = flat(OLD), flat(OLD) - flat(OLD_MINUS_SAMPLER)
    new_C = flat(OLD) + flat(NEW_MINUS_OLD)
    seen = inputs(new_C, sampler_C, torch.ones(8).double(), LENGTHS, ALL, start_logprobs_C=start_C, **more)
    correction = CORRECTIONS.get(bounds.name)
    return figures(measure(seen, bounds, correction.weights(seen, bounds) if correction else None))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_one_token_that_moves_far_does_not_decide_the_bounded_mean():
    log_w = torch.tensor([0.1, -0.2, 12.0, 0.0, -1.5, 0.3, 0.0, 0.1]).double()
    seen = inputs(flat(OLD), flat(OLD) - log_w, torch.ones(8).double(), LENGTHS, ALL, start_logprobs_C=flat(OLD))
    found = figures(measure(seen, NONE, None))
    assert found["rollout_abs_diff"] == pytest.approx(14.2 / 8)
    assert found["rollout_abs_diff_bounded"] == pytest.approx((0.7 + 2 * FURTHEST) / 8)


def test_figures_of_the_fixture():
    found = fixture(far=0.5)
    log_w = [value for row in OLD_MINUS_SAMPLER for value in row]
    assert found["rollout_kl"] == pytest.approx(mean([w - 1 - x for w, x in zip(W, log_w, strict=True)]), abs=1e-6)
    assert found["rollout_kl_k1"] == pytest.approx(-mean(log_w))
    assert found["rollout_abs_diff"] == pytest.approx(mean([abs(x) for x in log_w]))
    assert found["rollout_abs_diff_bounded"] == pytest.approx(mean([min(abs(x), FURTHEST) for x in log_w]))
    assert found["rollout_abs_diff_max"] == pytest.approx(1.0)
    assert found["rollout_abs_diff_p99"] == pytest.approx(1.0, rel=0.15)
    assert found["rollout_far"] == 0.25
    assert found["rollout_prob_diff_max"] == pytest.approx(math.exp(-0.5) - math.exp(-1.5))
    weights = {"weight_mean": mean(W), "weight_min": min(W), "weight_max": max(W)}
    assert {name: found[name] for name in weights} == pytest.approx(weights, abs=1e-6)
    assert (found["weight_above"], found["weight_below"]) == (0.125, 0.125)
    squares = [w * w for w in W]
    assert found["ess_tokens"] == pytest.approx(sum(W) ** 2 / (8 * sum(squares)), rel=1e-5)
    assert found["chi2_tokens"] == pytest.approx(mean(squares) - 1, rel=1e-5)
    of_rows = [w * w for w in PRODUCTS]
    assert found["ess_sequences"] == pytest.approx(sum(PRODUCTS) ** 2 / (4 * sum(of_rows)), rel=1e-5)
    assert found["chi2_sequences"] == pytest.approx(mean(of_rows) - 1, rel=1e-5)
    ratios = [math.exp(-sum(row) / len(row)) for row in OLD_MINUS_SAMPLER]
    assert found["rollout_perplexity_ratio"] == pytest.approx(mean(ratios))
    assert found["dropped_tokens"] == found["dropped_sequences"] == 0.0
    assert [found[f"weights_le_{bound}"] for bound in ("0.25", "0.5", "0.95", "1", "1.05", "2", "4", "+Inf")] == [
        *(0, 1, 2, 4, 7, 7, 8, 8)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bounds", "tokens", "sequences"),
    [
        (Bounds("tis", 0.0, 2.0), 0.0, 0.0),
        (Bounds("icepop", 0.5, 5.0), 0.125, 0.0),
        (Bounds("icepop", 0.99, 1.0), 7 / 8, 0.75),
        (Bounds("seq_mask", 0.0, 2.0), 3 / 8, 0.25),
        (Bounds("geo_mask", 0.8, 1.2), 5 / 8, 0.5),
    ],
)
def test_what_a_correction_drops_is_counted(bounds, tokens, sequences):
    found = fixture(bounds)
    assert (found["dropped_tokens"], found["dropped_sequences"]) == (tokens, sequences)


def test_unknown_samplers_are_in_no_figure():
    normaliser = Normaliser(4, 2, 4)
    new_C, sampler_C = flat([[-1.0, -2.0, -9.0, -9.0]]), torch.tensor([-1.1, -2.0, math.nan, math.nan]).double()
    with_them = measure(inputs(new_C, sampler_C, new_C, [3, 1], normaliser), NONE, None)
    without = measure(inputs(new_C[:2], sampler_C[:2], new_C[:2], [2], normaliser), NONE, None)
    assert figures(with_them) == figures(without)
    assert figures(measure(inputs(new_C[2:], sampler_C[2:], new_C[2:], [2], normaliser), NONE, None)) == {}
    assert figures(Mismatch.none(torch.device("cpu"))) == {}


def test_equal_policies_are_no_mismatch():
    new_C = flat(OLD)
    found = figures(measure(inputs(new_C, new_C, new_C, LENGTHS, ALL), NONE, None))
    ones = {"weight_mean", "weight_min", "weight_max", "ess_tokens", "ess_sequences", "rollout_perplexity_ratio"}
    assert all(found[name] == 1.0 for name in ones)
    zeros = {name for name in found if not name.startswith("weights_le")} - ones - {"rollout_abs_diff_p99"}
    assert {name: found[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert found["rollout_abs_diff_p99"] == DIFFERENCES[0] == 1e-6


@given(st.lists(st.floats(1e-5, 15), min_size=1, max_size=300))
def test_the_quantile_is_right_within_the_width_of_a_bucket(values):
    counts = torch.zeros(len(DIFFERENCES) + 1).double()
    counts.index_add_(0, torch.bucketize(torch.tensor(values).double(), torch.tensor(DIFFERENCES).double()),
                      torch.ones(len(values)).double())  # fmt: skip
    exact = sorted(values)[math.ceil(0.99 * len(values) - 1e-9) - 1]
    assert exact * (1 - 1e-6) <= quantile(counts.tolist(), 0.99) <= exact * 1.16


def test_the_bounds_of_the_histograms_ascend():
    assert list(WEIGHTS) == sorted(set(WEIGHTS)) and 1.0 in WEIGHTS
    assert list(DIFFERENCES) == sorted(set(DIFFERENCES)) and DIFFERENCES[-1] == pytest.approx(20.0)
