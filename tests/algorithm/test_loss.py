"""The numbers were checked against TRL 1.16, OpenRLHF 0.11 and verl 0.9.1 on the same inputs (float64)."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm import terms as module
from grpo.algorithm.aggregation import AGGREGATIONS
from grpo.algorithm.correction import NONE, Bounds
from grpo.algorithm.inputs import LossInputs, Normaliser, k3
from grpo.algorithm.loss import LOSSES, LossOutput, needs_of, policy_loss, statistics_of
from grpo.algorithm.mismatch import figures
from grpo.algorithm.needs import Needs
from grpo.algorithm.terms import Term
from grpo.config import Algorithm
from grpo.config.variants import VARIANTS

OLD = [[-1.0, -0.5, -2.0], [-0.7, -1.2], [-1.5], [-1.5, -1.4]]
NEW_MINUS_OLD = [[0.10, -0.30, 0.25], [0.05, -0.40], [1.20], [-0.02, 0.30]]
OLD_MINUS_SAMPLER = [[0.90, -0.05, 0.02], [-0.10, 0.01], [0.0], [-1.00, 0.03]]
REFERENCE_MINUS_NEW = [[0.10, -0.20, 0.30], [0.0, 0.5], [-0.4], [0.2, -0.1]]
ADVANTAGES = [0.86587543, -0.86587543, -0.86587543, 0.86587543]  # rewards 1 0 0 1, std N-1, eps 1e-4
ALL = Normaliser(tokens=8, sequences=4, max_tokens=8, prompts=1)


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def per_token(values: list[float], lengths: list[int]) -> torch.Tensor:
    return flat([[value] * length for value, length in zip(values, lengths, strict=True)])


def inputs(
    new_C: torch.Tensor, old_C: torch.Tensor, advantages_C: torch.Tensor, lengths: list[int], normaliser: Normaliser,
    **more: torch.Tensor,
) -> LossInputs:  # fmt: skip
    rows_C = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return LossInputs(new_C, old_C, advantages_C, rows_C, torch.tensor(lengths), normaliser, **more)


def fixture(
    variant: str,
    rows: tuple[int, ...] = (0, 1, 2, 3),
    advantages: list[float] = ADVANTAGES,
    bounds: Bounds = NONE,
    **knobs: float,
) -> tuple[LossOutput, torch.Tensor]:
    """The loss of some rows of the fixture with the normaliser of all, and its gradient by logprob.

    With the bounds of a correction the sampler is another one than the old policy.
    """
    clip = {"clip_low": 0.2, "clip_high": 0.28} if "clip_low" in VARIANTS[variant].keys else {}  # noqa: SIM118
    algorithm = Algorithm.model_validate({"loss": variant, **clip} | knobs)
    old_C = flat([OLD[row] for row in rows])
    new_C = (old_C + flat([NEW_MINUS_OLD[row] for row in rows])).requires_grad_()
    reference_C = new_C.detach() + flat([REFERENCE_MINUS_NEW[row] for row in rows])
    lengths = [len(OLD[row]) for row in rows]
    advantages_C = per_token([advantages[row] for row in rows], lengths)
    more = {"reference_logprobs_C": reference_C, "prompt_tokens_R": torch.full((len(rows),), ALL.tokens)}
    sampler_C = old_C
    if bounds != NONE:
        more["start_logprobs_C"], sampler_C = old_C, old_C - flat([OLD_MINUS_SAMPLER[row] for row in rows])
    output = policy_loss(inputs(new_C, sampler_C, advantages_C, lengths, ALL, **more), algorithm, bounds)
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    return output, gradient_C


@pytest.mark.parametrize(
    ("variant", "knobs", "advantages", "loss", "gradient"),
    [
        ("grpo", {"clip_high": 0.2}, ADVANTAGES, 0.463313, 0.593195),
        ("grpo", {"clip_high": 0.2, "kl_coef": 0.04}, ADVANTAGES, 0.465137, 0.591704),
        ("dapo", {}, ADVANTAGES, -0.023249, 0.167244),
        ("dr_grpo", {"clip_high": 0.2}, [0.5, -0.5, -0.5, 0.5], -0.000856, 0.024144),
    ],
)
def test_losses_equal_the_reference_implementations(variant, knobs, advantages, loss, gradient):
    output, gradient_C = fixture(variant, advantages=advantages, **knobs)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert gradient_C.sum().item() == pytest.approx(gradient, abs=1e-6)


def test_statistics_of_the_fixture():
    sums = fixture("dapo", kl_coef=0.04)[0].sums
    means = {name: value.item() / 8 for name, value in sums.items()}
    assert sums["tokens"].item() == 8
    assert means["clip_low"] == 0.125
    assert means["clip_high"] == 0.25
    assert means["approx_kl"] == pytest.approx(0.165223, abs=1e-6)
    assert figures(fixture("dapo")[0].mismatch)["rollout_abs_diff"] == pytest.approx(2.62 / 8)
    assert means["kl_reference"] == pytest.approx(0.039880, abs=1e-6)
    assert fixture("dapo")[0].ratio_max.item() == pytest.approx(3.320117, abs=1e-6)


def test_parts_of_two_ranks_add_up_to_the_whole_batch():
    first, second = fixture("dapo", rows=(0, 1))[0].loss.item(), fixture("dapo", rows=(2, 3))[0].loss.item()
    assert 2 * first == pytest.approx(-0.275937, abs=1e-6)
    assert 2 * second == pytest.approx(0.229439, abs=1e-6)
    assert first + second == pytest.approx(-0.023249, abs=1e-6)
    # what local means would give: another sign
    assert (8 / 5 * first + 8 / 3 * second) / 2 == pytest.approx(0.042585, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        ("dapo", [1 / 8] * 8),
        ("grpo", [1 / 12] * 3 + [1 / 8] * 2 + [1 / 4] + [1 / 8] * 2),
        ("dr_grpo", [1 / 32] * 8),
    ],
)
def test_on_policy_gradient_is_minus_advantage_times_weight(variant, weights):
    lengths = [len(row) for row in OLD]
    advantages_C = per_token(ADVANTAGES, lengths)
    new_C = flat(OLD).requires_grad_()
    output = policy_loss(inputs(new_C, flat(OLD), advantages_C, lengths, ALL), Algorithm(loss=variant))
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    assert gradient_C.tolist() == pytest.approx((-advantages_C * flat([weights])).tolist())


def test_unknown_rollout_logprob_is_a_ratio_of_one_and_no_statistic():
    new_C = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout_C = torch.tensor([float("nan"), -2.5])
    seen = inputs(
        new_C, rollout_C, torch.tensor([3.0, -1.0]), [2], Normaliser(2, 1, 4), entropy_C=torch.tensor([7.0, 1.0])
    )
    output = policy_loss(seen, Algorithm())
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    assert gradient_C.tolist() == pytest.approx([-1.5, 0.5 * 2.718281828**0.5])
    assert output.sums["tokens"].item() == 1
    assert output.sums["entropy"].item() == 1.0
    assert figures(output.mismatch)["rollout_abs_diff"] == 0.5
    assert output.ratio_max.item() == pytest.approx(2.718281828**0.5)


def test_absurd_log_ratios_stay_finite():
    new_C = torch.tensor([-1.0, -500.0], requires_grad=True)
    rollout_C = torch.tensor([-500.0, -1.0])
    reference_C = torch.tensor([-900.0, -1.0])
    seen = inputs(
        new_C, rollout_C, torch.tensor([-1.0, 1.0]), [2], Normaliser(2, 1, 4), reference_logprobs_C=reference_C
    )
    output = policy_loss(seen, Algorithm(kl_coef=0.1))
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    assert output.loss.isfinite() and gradient_C.isfinite().all()
    assert all(value.isfinite() for value in output.sums.values())


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=8))
def test_k3_is_never_negative_and_zero_for_equals(ratios):
    values_C = k3(torch.tensor(ratios, dtype=torch.float64))
    assert (values_C >= -1e-15).all()
    assert k3(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_k3_of_a_small_log_ratio_keeps_its_digits():
    assert k3(torch.tensor(1e-3)).item() == pytest.approx(0.5e-6, rel=0.1)


tokens = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2))
batches = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=6)


@pytest.mark.parametrize("variant", sorted(LOSSES))
@given(rows=batches, cut=st.integers(0, 6))
def test_any_split_of_the_rows_adds_up(variant, rows, cut):
    normaliser = Normaliser(sum(map(len, rows)), len(rows), 5)

    def part(some: list[list[tuple[float, float, float]]]) -> float:
        if not some:
            return 0.0
        new_C, old_C, advantages_C = (flat([[token[i] for token in row] for row in some]) for i in range(3))
        lengths = [len(row) for row in some]
        seen = inputs(new_C, old_C, advantages_C, lengths, normaliser)
        return policy_loss(seen, Algorithm(loss=variant)).loss.item()

    assert part(rows[:cut]) + part(rows[cut:]) == pytest.approx(part(rows), abs=1e-9)


def test_the_configuration_names_the_losses_of_the_table():
    assert set(get_args(Algorithm.model_fields["loss"].annotation)) == set(LOSSES)


def test_what_a_configuration_needs():
    assert needs_of(Algorithm()) == Needs()
    assert needs_of(Algorithm(kl_coef=0.1)) == Needs(reference=True, zero_advantage_rows=True)
    assert needs_of(Algorithm(entropy_coef=0.1)) == Needs(entropy_gradient=True, zero_advantage_rows=True)
    assert needs_of(Algorithm(kl_coef=0.1, entropy_coef=0.1)) == Needs(True, True, True)


@pytest.mark.parametrize("knobs", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_every_output_has_the_named_statistics(knobs):
    new_C = flat(OLD).requires_grad_()
    reference = {"reference_logprobs_C": flat(OLD)} if "kl_coef" in knobs else {}
    seen = inputs(new_C, flat(OLD), new_C.detach(), [3, 2, 1, 2], ALL, entropy_C=new_C * 2, **reference)
    assert set(policy_loss(seen, Algorithm(**knobs)).sums) == set(statistics_of(Algorithm(**knobs)))


@pytest.mark.parametrize("variant", sorted(LOSSES))
def test_the_entropy_bonus_lowers_the_loss_by_its_weighted_mean(variant):
    new_C, entropy_C = flat(OLD).requires_grad_(), flat(NEW_MINUS_OLD).requires_grad_()
    seen = inputs(new_C, flat(OLD), torch.zeros(8, dtype=torch.float64), [3, 2, 1, 2], ALL, entropy_C=entropy_C)
    output = policy_loss(seen, Algorithm(loss=variant, entropy_coef=0.5))
    weights_C = AGGREGATIONS[Algorithm(loss=variant).aggregation](seen).detach()
    assert output.loss.item() == pytest.approx(-0.5 * (weights_C * entropy_C).sum().item())
    (gradient_C,) = torch.autograd.grad(output.loss, entropy_C)
    assert gradient_C.tolist() == pytest.approx((-0.5 * weights_C).tolist())


def test_a_term_that_comes_detached_is_an_error():
    """As the entropy did, which was a statistic: a bonus of it would have taught nothing."""
    new_C = flat(OLD).requires_grad_()
    seen = inputs(new_C, flat(OLD), new_C.detach(), [3, 2, 1, 2], ALL, entropy_C=flat(OLD))
    with pytest.raises(AssertionError, match="that of entropy is detached and would teach nothing"):
        policy_loss(seen, Algorithm(entropy_coef=0.1))
    without = inputs(flat(OLD), flat(OLD), flat(OLD), [3, 2, 1, 2], ALL, entropy_C=flat(OLD))
    assert policy_loss(without, Algorithm(entropy_coef=0.1)).loss.isfinite(), "nothing learns here"


def test_a_term_of_ones_own_is_one_row(monkeypatch):
    needs = Needs(zero_advantage_rows=True)
    own = Term(lambda algorithm, inputs: 2.0, lambda seen: seen.logprobs_C**2, needs, "squares")
    monkeypatch.setattr(module, "TERMS", (*module.TERMS, own))
    assert needs_of(Algorithm()) == Needs(zero_advantage_rows=True)
    output, gradient_C = fixture("dapo", advantages=[0.0] * 4)
    new_C = flat(OLD) + flat(NEW_MINUS_OLD)
    assert gradient_C.tolist() == pytest.approx((4 * new_C / 8).tolist())
    assert output.sums["squares"].item() == pytest.approx((new_C**2).sum().item())


def test_sums_over_the_rows_for_losses_of_whole_sequences():
    seen = inputs(flat(OLD), flat(OLD), flat(OLD), [3, 2, 1, 2], ALL)
    assert seen.sum_R(seen.logprobs_C).tolist() == pytest.approx([sum(row) for row in OLD])
    assert seen.lengths_C.tolist() == [3, 3, 3, 2, 2, 1, 2, 2]
