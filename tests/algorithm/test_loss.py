"""The numbers were checked against TRL 1.16, OpenRLHF 0.11 and verl 0.9.1 on the same inputs (float64)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.loss import LOSSES, LossOutput, Normaliser, k3, policy_loss

OLD = [[-1.0, -0.5, -2.0], [-0.7, -1.2], [-1.5], [-1.5, -1.4]]
NEW_MINUS_OLD = [[0.10, -0.30, 0.25], [0.05, -0.40], [1.20], [-0.02, 0.30]]
REFERENCE_MINUS_NEW = [[0.10, -0.20, 0.30], [0.0, 0.5], [-0.4], [0.2, -0.1]]
ADVANTAGES = [0.86587543, -0.86587543, -0.86587543, 0.86587543]  # rewards 1 0 0 1, std N-1, eps 1e-4
ALL = Normaliser(tokens=8, sequences=4)


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def fixture(
    variant: str, rows: tuple[int, ...] = (0, 1, 2, 3), low: float = 0.2, high: float = 0.28, kl_coef: float = 0.0
) -> tuple[LossOutput, torch.Tensor]:
    """The loss of some rows of the fixture with the normaliser of all, and its gradient by logprob."""
    old_C = flat([OLD[row] for row in rows])
    new_C = (old_C + flat([NEW_MINUS_OLD[row] for row in rows])).requires_grad_()
    reference_C = new_C.detach() + flat([REFERENCE_MINUS_NEW[row] for row in rows])
    lengths = [len(OLD[row]) for row in rows]
    output = policy_loss(
        variant,
        new_C,
        old_C,
        flat([[ADVANTAGES[row]] * length for row, length in zip(rows, lengths, strict=True)]),
        flat([[float(length)] * length for length in lengths]),
        ALL,
        clip_low=low,
        clip_high=high,
        kl_coef=kl_coef,
        reference_logprobs_C=reference_C if kl_coef else None,
    )
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    return output, gradient_C


@pytest.mark.parametrize(
    ("variant", "high", "kl_coef", "loss", "gradient"),
    [
        ("grpo", 0.2, 0.0, 0.463313, 0.593195),
        ("grpo", 0.2, 0.04, 0.465137, 0.591704),
        ("dapo", 0.28, 0.0, -0.023249, 0.167244),
    ],
)
def test_losses_equal_the_reference_implementations(variant, high, kl_coef, loss, gradient):
    output, gradient_C = fixture(variant, high=high, kl_coef=kl_coef)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert gradient_C.sum().item() == pytest.approx(gradient, abs=1e-6)


def test_statistics_of_the_fixture():
    sums = fixture("dapo", kl_coef=0.04)[0].sums
    means = {name: value.item() / 8 for name, value in sums.items()}
    assert sums["tokens"].item() == 8
    assert means["clip_low"] == 0.125
    assert means["clip_high"] == 0.25
    assert means["approx_kl"] == pytest.approx(0.165223, abs=1e-6)
    assert means["abs_diff"] == pytest.approx(2.62 / 8)
    assert means["kl_reference"] == pytest.approx(0.039880, abs=1e-6)
    assert fixture("dapo")[0].maxima["ratio_max"].item() == pytest.approx(3.320117, abs=1e-6)


def test_parts_of_two_ranks_add_up_to_the_whole_batch():
    first, second = fixture("dapo", rows=(0, 1))[0].loss.item(), fixture("dapo", rows=(2, 3))[0].loss.item()
    assert 2 * first == pytest.approx(-0.275937, abs=1e-6)
    assert 2 * second == pytest.approx(0.229439, abs=1e-6)
    assert first + second == pytest.approx(-0.023249, abs=1e-6)
    # what local means would give: another sign
    assert (8 / 5 * first + 8 / 3 * second) / 2 == pytest.approx(0.042585, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "weights"), [("dapo", [1 / 8] * 8), ("grpo", [1 / 12] * 3 + [1 / 8] * 2 + [1 / 4] + [1 / 8] * 2)]
)
def test_on_policy_gradient_is_minus_advantage_times_weight(variant, weights):
    lengths_C = flat([[float(len(row))] * len(row) for row in OLD])
    advantages_C = flat([[a] * len(row) for a, row in zip(ADVANTAGES, OLD, strict=True)])
    new_C = flat(OLD).requires_grad_()
    output = policy_loss(variant, new_C, flat(OLD), advantages_C, lengths_C, ALL, clip_low=0.2, clip_high=0.28)
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    assert gradient_C.tolist() == pytest.approx((-advantages_C * flat([weights])).tolist())


def test_unknown_rollout_logprob_is_a_ratio_of_one_and_no_statistic():
    new_C = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout_C = torch.tensor([float("nan"), -2.5])
    output = policy_loss(
        "dapo", new_C, rollout_C, torch.tensor([3.0, -1.0]), torch.tensor([2.0, 2.0]), Normaliser(2, 1),
        entropy_C=torch.tensor([7.0, 1.0]), clip_low=0.2, clip_high=0.28,
    )  # fmt: skip
    (gradient_C,) = torch.autograd.grad(output.loss, new_C)
    assert gradient_C.tolist() == pytest.approx([-1.5, 0.5 * 2.718281828**0.5])
    assert output.sums["tokens"].item() == 1
    assert output.sums["entropy"].item() == 1.0
    assert output.sums["abs_diff"].item() == 0.5
    assert output.maxima["ratio_max"].item() == pytest.approx(2.718281828**0.5)


def test_absurd_log_ratios_stay_finite():
    new_C = torch.tensor([-1.0, -500.0], requires_grad=True)
    rollout_C = torch.tensor([-500.0, -1.0])
    output = policy_loss(
        "dapo", new_C, rollout_C, torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]), Normaliser(2, 1),
        clip_low=0.2, clip_high=0.28, kl_coef=0.1, reference_logprobs_C=torch.tensor([-900.0, -1.0]),
    )  # fmt: skip
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
    normaliser = Normaliser(sum(map(len, rows)), len(rows))

    def part(some: list[list[tuple[float, float, float]]]) -> float:
        if not some:
            return 0.0
        new_C, old_C, advantages_C = (flat([[token[i] for token in row] for row in some]) for i in range(3))
        lengths_C = flat([[float(len(row))] * len(row) for row in some])
        output = policy_loss(variant, new_C, old_C, advantages_C, lengths_C, normaliser, clip_low=0.2, clip_high=0.28)
        return output.loss.item()

    assert part(rows[:cut]) + part(rows[cut:]) == pytest.approx(part(rows), abs=1e-9)
