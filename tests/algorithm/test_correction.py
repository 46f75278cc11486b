"""The numbers were checked against TRL 1.16, OpenRLHF 0.11 and verl 0.9.1 on the same inputs (float64)."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.correction import CORRECTIONS, NONE, WEIGHT_LIMIT, Bounds, bounds_of
from grpo.algorithm.inputs import LossInputs, Normaliser
from grpo.algorithm.loss import LOSSES, LossOutput, policy_loss
from grpo.config import Algorithm, Config
from tests.algorithm.test_loss import ALL, OLD, fixture, flat, inputs

BOUNDS = {name: Bounds(name, row.low, row.high) for name, row in CORRECTIONS.items()}


@pytest.mark.parametrize(
    ("name", "loss", "gradient"),
    [
        ("tis", -0.088869, 0.107771),
        ("icepop", -0.104817, 0.091824),
        ("seq_mask", -0.357846, -0.053780),
        ("geo_mask", 0.549764, 0.462307),
    ],
)
def test_corrections_equal_the_reference_implementations(name, loss, gradient):
    output, gradient_C = fixture("dapo", bounds=BOUNDS[name])
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert gradient_C.sum().item() == pytest.approx(gradient, abs=1e-6)


def test_a_wide_enough_bound_is_decoupled_ppo():
    for name in ("tis", "icepop", "geo_mask"):
        output, gradient_C = fixture("dapo", bounds=Bounds(name, 0.0, 1000.0))
        assert output.loss.item() == pytest.approx(-0.143845, abs=1e-6)
        assert gradient_C.sum().item() == pytest.approx(0.052795, abs=1e-6)


def test_the_ratio_without_a_correction_is_the_whole_weight():
    """What decoupled PPO has as w x (new / old) inside the bounds is new / sampler; both would count it twice."""
    new_C = flat(OLD).requires_grad_()
    sampler_C, advantages_C = flat(OLD) - 0.1, torch.ones(8, dtype=torch.float64)
    seen = inputs(new_C, sampler_C, advantages_C, [3, 2, 1, 2], ALL)
    bypass, decoupled = policy_loss(seen, Algorithm()), policy_loss(seen, Algorithm(), BOUNDS["tis"])
    assert bypass.loss.item() == pytest.approx(decoupled.loss.item()) == pytest.approx(-math.exp(0.1))
    for output in (bypass, decoupled):
        assert torch.autograd.grad(output.loss, new_C)[0].tolist() == pytest.approx([-math.exp(0.1) / 8] * 8)


def one_row(sampler: list[float], trainer: list[float], **more: torch.Tensor) -> LossInputs:
    count = len(sampler)
    new_C = torch.tensor(trainer, dtype=torch.float64, requires_grad=True)
    return inputs(new_C, flat([sampler]), torch.ones(count).double(), [count], Normaliser(count, 1, count), **more)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_an_unknown_sampler_has_weight_one_and_no_part_in_its_row(name):
    """The others of its row are weighed as if it were not there: its absence dilutes no mean."""
    weigh = CORRECTIONS[name].weights
    with_it = weigh(one_row([-1.1, math.nan, -1.2], [-1.0, -3.0, -1.0]), BOUNDS[name])
    without = weigh(one_row([-1.1, -1.2], [-1.0, -1.0]), BOUNDS[name])
    assert with_it[[0, 2]].tolist() == without.tolist()
    assert with_it[1].item() == (pytest.approx(math.exp(0.3)) if name == "seq_mask" else 1.0)
    alone = weigh(one_row([math.nan], [-3.0]), BOUNDS[name])
    assert alone.tolist() == [1.0]
    edge = weigh(one_row([-1.0, math.nan], [-0.81, -1.0]), Bounds("geo_mask", 0.8, 1.2))
    assert CORRECTIONS["geo_mask"].weights is not weigh or edge.tolist() == [0.0, 0.0], "e^0.19 is above 1.2"


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_absurd_weights_stay_finite(name):
    seen = one_row([-700.0, -1.0, -math.inf, -700.0], [-1.0, -700.0, -1.0, -1.0])
    for bounds in (BOUNDS[name], Bounds(name, 0.0, math.inf)):
        output = policy_loss(seen, Algorithm(), bounds)
        assert output.loss.isfinite()
        assert torch.autograd.grad(output.loss, seen.logprobs_C)[0].isfinite().all()


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_the_weight_is_detached_and_spares_the_other_terms(name):
    """A row that is dropped for its sampler keeps its KL and its entropy."""
    new_C = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    entropy_C = (new_C * 1.0).requires_grad_()
    far = one_row([-9.0, -9.0], [-1.0, -2.0])
    seen = inputs(
        new_C, far.rollout_logprobs_C, far.advantages_C, [2], far.normaliser,
        reference_logprobs_C=new_C.detach() - 0.5, entropy_C=entropy_C,
    )  # fmt: skip
    terms = Algorithm(kl_coef=0.1, entropy_coef=0.2)
    plain = policy_loss(seen, Algorithm(), BOUNDS[name]).loss
    with_terms = policy_loss(seen, terms, BOUNDS[name]).loss
    weights_C = CORRECTIONS[name].weights(seen, BOUNDS[name])
    assert not weights_C.requires_grad
    added = 0.1 * (math.exp(-0.5) - 1 + 0.5) - 0.2 * entropy_C.mean().item()
    assert (with_terms - plain).item() == pytest.approx(added)
    assert torch.autograd.grad(plain, new_C)[0].tolist() == pytest.approx((-weights_C / 2).tolist())


logprobs = st.floats(-3, 0)
tokens = st.tuples(logprobs, logprobs, logprobs | st.just(math.nan), st.floats(-2, 2))
batches = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=6)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
@given(rows=batches, cuts=st.sets(st.integers(0, 6)), variant=st.sampled_from(sorted(LOSSES)))
def test_any_split_of_the_rows_adds_up(name, rows, cuts, variant):
    """Over micro-batches and ranks: the loss, the gradient, and every sum and extreme of the mismatch."""
    normaliser = Normaliser(sum(map(len, rows)), len(rows), 5)

    def part(some: list[list[tuple[float, float, float, float]]]) -> tuple[LossOutput, list[float]]:
        new_C, start_C, sampler_C, advantages_C = (
            flat([[token[i] for token in row] for row in some]) for i in range(4)
        )
        new_C.requires_grad_()
        seen = inputs(new_C, sampler_C, advantages_C, list(map(len, some)), normaliser, start_logprobs_C=start_C)
        output = policy_loss(seen, Algorithm(loss=variant), BOUNDS[name])
        return output, torch.autograd.grad(output.loss, new_C)[0].tolist()

    bounds = [0, *sorted(cuts), len(rows)]
    parts = [part(some) for start, end in zip(bounds, bounds[1:], strict=False) if (some := rows[start:end])]
    (whole, gradient), (first, _), *rest = part(rows), *parts
    assert sum(output.loss.item() for output, _ in parts) == pytest.approx(whole.loss.item(), abs=1e-9)
    assert [value for _, values in parts for value in values] == pytest.approx(gradient, abs=1e-12)
    mismatch = sum((output.mismatch for output, _ in rest), first.mismatch)
    assert mismatch.sums.tolist() == pytest.approx(whole.mismatch.sums.tolist(), rel=1e-9, abs=1e-9)
    assert mismatch.maxima.tolist() == whole.mismatch.maxima.tolist()


def settings(staleness: int = 0, **algorithm: object) -> Config:
    sections = {"model": {"path": "m"}, "rollout": {"max_staleness": staleness}, "algorithm": algorithm}
    return Config.model_validate(sections)


def test_the_configuration_names_the_corrections_of_the_table():
    named, _ = get_args(Algorithm.model_fields["correction"].annotation)
    assert set(get_args(named)) == {"none", *CORRECTIONS}


def test_older_samples_are_corrected_unless_said_otherwise():
    assert bounds_of(settings()) == NONE
    assert bounds_of(settings(1)) == Bounds("tis", 0.0, WEIGHT_LIMIT)
    assert bounds_of(settings(4, correction="none")) == NONE
    assert bounds_of(settings(correction="geo_mask")) == Bounds("geo_mask", 0.8, 1.2)
    own = settings(2, correction="icepop", correction_low=0.0, correction_high=1.0)
    assert bounds_of(own) == Bounds("icepop", 0.0, 1.0)


@pytest.mark.parametrize(
    ("staleness", "algorithm", "said"),
    [
        (0, {"correction_high": 3.0}, "algorithm.correction_high = 3, but algorithm.correction is none"),
        (2, {"correction": "none", "correction_low": 0.5}, "name a correction or remove the bound"),
        (1, {"correction_low": 2.0, "correction_high": 0.5}, "less than 1"),
        (1, {"correction_high": 0.9}, "greater than or equal to 1"),
        (1, {"correction_low": math.nan}, "finite|less than 1|greater than or equal to 0"),
        (1, {"correction": "ppo"}, "'none', 'tis'"),
    ],
)
def test_bounds_that_would_drop_everything_or_do_nothing_are_refused(staleness, algorithm, said):
    """A band holds 1, the weight of a sampler that agrees: none can be inverted."""
    with pytest.raises(ValueError, match=said):
        settings(staleness, **algorithm)
