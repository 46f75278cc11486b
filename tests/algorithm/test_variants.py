"""Every variant: the numbers of other implementations, and what each has to be true of.

The numbers were checked against TRL 1.16, OpenRLHF 0.11 and verl 0.9.1 on the same inputs (float64).
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.aggregation import AGGREGATIONS
from grpo.algorithm.correction import CORRECTIONS, NONE, Bounds
from grpo.algorithm.inputs import LossInputs, Normaliser
from grpo.algorithm.loss import LOSSES, LossOutput, policy_loss
from grpo.algorithm.mismatch import figures
from grpo.config import Algorithm
from grpo.config import variants as config_variants
from tests.algorithm.test_loss import (
    ADVANTAGES,
    ALL,
    NEW_MINUS_OLD,
    OLD,
    OLD_MINUS_SAMPLER,
    fixture,
    flat,
    inputs,
    per_token,
)

CAPPED = Bounds("tis", 0.0, 2.0)
IGNORED = Bounds("tis", 1.0, 1.0)  # another sampler, whose weight is 1
ROWS: dict[str, tuple[dict[str, object], float, float]] = {
    "1": ({"variant": "grpo", "clip_high": 0.2}, 0.463313, 0.593195),
    "1b": ({"variant": "grpo", "clip_high": 0.2, "advantages": [1.0, -1.0, -1.0, 1.0]}, 0.535081, 0.685081),
    "2": ({"variant": "grpo", "clip_high": 0.2, "kl_coef": 0.04}, 0.465137, 0.591704),
    "3": ({"variant": "grpo", "clip_high": 0.2, "kl_coef": 0.04, "kl": "k3_ratio"}, 0.466563, 0.603336),
    "4": ({"variant": "dapo"}, -0.023249, 0.167244),
    "5": ({"variant": "dapo", "dual_clip": 3.0}, -0.057896, -0.192107),
    "6": ({"variant": "dr_grpo", "clip_high": 0.2, "advantages": [0.5, -0.5, -0.5, 0.5]}, -0.000856, 0.024144),
    "7": ({"variant": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, 0.501995, 0.718702),
    "7 by token": ({"variant": "gspo_token", "clip_low": 3e-4, "clip_high": 4e-4}, 0.501995, 0.718702),
    "9": ({"variant": "luspo", "clip_high": 0.2}, -0.076183, -0.076183),
    "10": ({"variant": "cispo", "clip_low": 1.0, "clip_high": 4.0}, 0.439132, -0.045281),
    "12": ({"variant": "sapo"}, 0.230273, -0.073883),
    "13": ({"variant": "vespo"}, 0.376850, -0.276454),
    "14": ({"variant": "dapo", "bounds": CAPPED}, -0.088869, 0.107771),
    "16": ({"variant": "dapo", "bounds": Bounds("icepop", 0.5, 5.0)}, -0.104817, 0.091824),
    "18": ({"variant": "dapo", "bounds": Bounds("seq_mask", 0.0, 3.0)}, -0.357846, -0.053780),
    "19": ({"variant": "dapo", "bounds": Bounds("geo_mask", 0.8, 1.2)}, 0.549764, 0.462307),
    "20": ({"variant": "dapo", "bounds": IGNORED, "off_policy_mask": 0.1}, -0.223620, 0.053460),
    "21": ({"variant": "dapo", "bounds": Bounds("decoupled")}, -0.143845, 0.052795),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_shared_fixture(row):
    settings, loss, gradient = ROWS[row]
    output, gradient_C = fixture(**settings)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert gradient_C.sum().item() == pytest.approx(gradient, abs=1e-6)


def test_cispo_by_the_sampler_is_aipo():
    """Row 23: without a correction the ratio is the whole weight, here capped at 2."""
    old_C = flat(OLD)
    new_C = (old_C + flat(NEW_MINUS_OLD)).requires_grad_()
    seen = inputs(new_C, old_C - flat(OLD_MINUS_SAMPLER), per_token(ADVANTAGES, [3, 2, 1, 2]), [3, 2, 1, 2], ALL)
    output = policy_loss(seen, Algorithm(loss="cispo", clip_high=1.0))
    assert output.loss.item() == pytest.approx(0.479778, abs=1e-6)
    assert torch.autograd.grad(output.loss, new_C)[0].sum().item() == pytest.approx(-0.231398, abs=1e-6)


def test_gspo_by_token_mean_would_be_another_loss(monkeypatch):
    """Row 8x, which the configuration refuses."""
    with pytest.raises(ValueError, match="gspo with aggregation = token_mean is not gspo: each of its"):
        Algorithm(loss="gspo", aggregation="token_mean")
    monkeypatch.setitem(AGGREGATIONS, "sequence_mean", AGGREGATIONS["token_mean"])
    output, gradient_C = fixture("gspo", clip_high=0.2)
    assert output.loss.item() == pytest.approx(-0.038092, abs=1e-6)
    assert gradient_C.sum().item() == pytest.approx(-0.038092, abs=1e-6)


def test_the_estimates_of_kl_pull_as_they_should():
    """With no advantage what is left is the term: k2 by x, k3 by 1 - e^-x, on-policy."""
    k2 = [-0.1, 0.2, -0.3, 0.0, -0.5, 0.4, -0.2, 0.1]
    k3 = [-0.1052, 0.1813, -0.3499, 0.0, -0.6487, 0.3297, -0.2214, 0.0952]
    for name, slopes in {"k2": k2, "k3": k3}.items():
        output, gradient_C = fixture("dapo", advantages=[0.0] * 4, kl=name, kl_coef=1.0)
        assert (8 * gradient_C).tolist() == pytest.approx(slopes, abs=1e-4)
        assert output.sums["kl_reference"].item() / 8 == pytest.approx(0.039880, abs=1e-6)
    assert fixture("dapo", advantages=[0.0] * 4, kl="k2", kl_coef=1.0)[0].loss.item() == pytest.approx(0.0375)


def test_a_dual_clip_is_seen_where_it_cuts():
    sums = fixture("dapo", dual_clip=3.0)[0].sums
    assert (sums["clip_low"].item(), sums["clip_high"].item()) == (1, 3)
    narrow = Algorithm(dual_clip=1.1)
    new_C = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)  # between the dual clip and the upper bound
    seen = inputs(new_C, torch.zeros(1).double(), torch.tensor([-1.0]).double(), [1], Normaliser(1, 1, 1, 1))
    assert policy_loss(seen, narrow).loss.item() == pytest.approx(1.1)
    up = replace(seen, advantages_C=-seen.advantages_C)
    assert policy_loss(up, narrow).loss.item() == pytest.approx(-math.exp(0.2)), "only where the advantage is negative"


def test_caps_count_whatever_the_advantage():
    sums = fixture("cispo", clip_low=1.0, clip_high=0.28)[0].sums
    assert (sums["clip_low"].item(), sums["clip_high"].item()) == (0, 3)
    for name in ("sapo", "vespo", "reinforce"):
        sums = fixture(name)[0].sums
        assert (sums["clip_low"].item(), sums["clip_high"].item()) == (0, 0)


def test_the_configuration_and_the_functions_name_the_same():
    assert set(config_variants.VARIANTS) == set(LOSSES)
    assert set(config_variants.AGGREGATIONS) == set(AGGREGATIONS)


# What must hold for every variant, on any rows

VARIANTS = sorted(LOSSES)
logprobs = st.floats(-3, 0)
tokens = st.tuples(logprobs, logprobs, logprobs | st.just(math.nan), logprobs)
any_rows = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=5), st.floats(-2, 2), st.sampled_from("abc")),
    min_size=1,
    max_size=6,
)
Row = tuple[list[tuple[float, float, float, float]], float, str]


def seen_by(rows: list[Row], of: list[Row], terms: bool = False) -> tuple[torch.Tensor, LossInputs]:
    """Some rows, with the sizes of the whole minibatch."""
    lengths = [len(row) for row, _, _ in of]
    total = {prompt: sum(len(row) for row, _, name in rows if name == prompt) for prompt in "abc"}
    prompts = len({prompt for _, _, prompt in rows})
    normaliser = Normaliser(sum(len(row) for row, _, _ in rows), len(rows), 5, prompts)
    new_C, start_C, sampler_C, reference_C = (flat([[token[i] for token in row] for row, _, _ in of]) for i in range(4))
    new_C.requires_grad_()
    more = {
        "start_logprobs_C": start_C,
        "prompt_tokens_R": torch.tensor([total[prompt] for _, _, prompt in of]),
        "entropy_C": new_C * -2.0,
    }
    if terms:
        more["reference_logprobs_C"] = reference_C
    advantages_C = per_token([advantage for _, advantage, _ in of], lengths)
    return new_C, inputs(new_C, sampler_C, advantages_C, lengths, normaliser, **more)


def outcome(rows: list[Row], of: list[Row], algorithm: Algorithm, bounds: Bounds) -> tuple[LossOutput, list[float]]:
    new_C, seen = seen_by(rows, of, terms=bool(algorithm.kl_coef))
    output = policy_loss(seen, algorithm, bounds)
    return output, torch.autograd.grad(output.loss, new_C)[0].tolist()


def choices(name: str) -> list[str]:
    variant = config_variants.VARIANTS[name]
    return [variant.aggregation] if variant.only else sorted(AGGREGATIONS)


def bounds_for(name: str, correction: str) -> Bounds:
    if config_variants.VARIANTS[name].weighs or correction == "none":
        return NONE
    return Bounds(correction, CORRECTIONS[correction].low, CORRECTIONS[correction].high)


@pytest.mark.parametrize("name", VARIANTS)
@given(rows=any_rows, order=st.randoms(use_true_random=False), cut=st.integers(0, 6), data=st.data())
def test_ranks_and_micro_batches_add_up_wherever_the_rows_go(name, rows, order, cut, data):
    """Also where a prompt's rows lie on both sides: value, gradient and every statistic."""
    algorithm = Algorithm(
        loss=name, aggregation=data.draw(st.sampled_from(choices(name))), off_policy_mask=0.3,
        kl=data.draw(st.sampled_from(["k2", "k3", "k3_ratio"])), kl_coef=0.1, entropy_coef=0.01,
    )  # fmt: skip
    bounds = bounds_for(name, data.draw(st.sampled_from(["none", *CORRECTIONS])))
    whole, gradient = outcome(rows, rows, algorithm, bounds)
    places = list(range(len(rows)))
    order.shuffle(places)
    sides = [some for some in (places[:cut], places[cut:]) if some]
    parts = [outcome(rows, [rows[place] for place in some], algorithm, bounds) for some in sides]
    assert sum(output.loss.item() for output, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-9)
    found: dict[int, list[float]] = {}
    for some, (_, values) in zip(sides, parts, strict=True):
        left = iter(values)
        found |= {place: [next(left) for _ in rows[place][0]] for place in some}
    values = [value for place in range(len(rows)) for value in found[place]]
    assert values == pytest.approx(gradient, rel=1e-9, abs=1e-9)
    for statistic, total in whole.sums.items():
        assert sum(output.sums[statistic].item() for output, _ in parts) == pytest.approx(total.item(), abs=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@given(rows=any_rows, data=st.data())
def test_on_policy_each_is_the_policy_gradient(name, rows, data):
    """Where policy, start and sampler are one, a token's gradient is -advantage times its share, in all of them."""
    aggregation = data.draw(st.sampled_from(choices(name)))
    same = [([(new, new, new, new) for new, *_ in row], advantage, prompt) for row, advantage, prompt in rows]
    new_C, seen = seen_by(same, same)
    algorithm = Algorithm(loss=name, aggregation=aggregation)
    output = policy_loss(seen, algorithm)
    gradient_C = torch.autograd.grad(output.loss, new_C)[0]
    shares_C = AGGREGATIONS[aggregation](seen).detach()
    if name in ("gspo", "luspo"):  # the ratio's gradient is the mean over the row
        shares_C = (seen.sum_R(shares_C) / seen.lengths_R)[seen.rows_C]
    assert gradient_C.tolist() == pytest.approx((-seen.advantages_C * shares_C).tolist(), rel=1e-6, abs=1e-9)
    assert output.ratio_max.item() == 1.0


def surrogate(algorithm: Algorithm, bounds: Bounds, seen: LossInputs, new_C: torch.Tensor, at: LossInputs) -> float:
    """The loss with what has no gradient held as it was: the function whose slope the gradient must be."""
    weight = LOSSES[algorithm.loss].value
    moved = replace(seen, logprobs_C=new_C)
    if weight.__name__ in ("capped", "gamma_weighted"):
        log_ratio_C = LOSSES[algorithm.loss].log_ratio(replace(at, corrected=bounds != NONE))
        token_C = weight(log_ratio_C.clamp(-20, 20), replace(at, logprobs_C=new_C), algorithm)
        weights_C = CORRECTIONS[bounds.name].weights(at, bounds) if bounds != NONE else 1.0
        return float((AGGREGATIONS[algorithm.aggregation](at) * weights_C * token_C).sum())
    return float(policy_loss(moved, algorithm, bounds).loss)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gspo_token"])
@given(rows=any_rows, data=st.data())
def test_the_gradient_is_the_slope_by_finite_differences(name, rows, data):
    wide = {"clip_low": 0.3, "clip_high": 0.4} if name in ("gspo", "luspo") else {}
    algorithm = Algorithm(loss=name, **wide)
    bounds = bounds_for(name, data.draw(st.sampled_from(["none", "tis", "decoupled", "seq_mask"])))
    rows = [([(a, b, b if math.isnan(c) else c, d) for a, b, c, d in row], adv, prompt) for row, adv, prompt in rows]
    new_C, seen = seen_by(rows, rows)
    seen = replace(seen, entropy_C=None)
    gradient_C = torch.autograd.grad(policy_loss(seen, algorithm, bounds).loss, new_C)[0]
    at = replace(seen, logprobs_C=new_C.detach())
    place, step = data.draw(st.integers(0, len(new_C) - 1)), 1e-6
    change_C = torch.zeros_like(at.logprobs_C)
    change_C[place] = step
    values = [surrogate(algorithm, bounds, at, at.logprobs_C + sign * change_C, at) for sign in (-1, 0, 1)]
    left, right = (values[1] - values[0]) / step, (values[2] - values[1]) / step
    slack = 1e-3 * max(1.0, abs(left), abs(right))
    assert min(left, right) - slack <= gradient_C[place].item() <= max(left, right) + slack, "a bound may lie between"


def test_gspo_token_has_the_value_of_gspo_and_the_slope_of_each_token():
    """With one advantage a row both gradients are the same; with one a token each token has its own."""
    for name in ("gspo", "gspo_token"):
        output, gradient_C = fixture(name, clip_low=0.3, clip_high=0.3)
        assert output.loss.item() == pytest.approx(fixture("gspo", clip_low=0.3, clip_high=0.3)[0].loss.item())
        assert gradient_C.tolist() == pytest.approx(fixture("gspo", clip_low=0.3, clip_high=0.3)[1].tolist())
    new_C = torch.tensor([-1.0, -1.0]).double().requires_grad_()
    seen = inputs(new_C, new_C.detach() - 0.1, torch.tensor([2.0, -1.0]).double(), [2], Normaliser(2, 1, 2, 1))
    slopes = torch.autograd.grad(policy_loss(seen, Algorithm(loss="gspo_token", clip_high=0.3)).loss, new_C)[0]
    assert slopes.tolist() == pytest.approx([-2.0 * math.exp(0.1) / 2, 1.0 * math.exp(0.1) / 2])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("far", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_log_ratios_of_a_thousand_stay_finite(name, far, advantage):
    for bounds in (NONE, *(bounds_for(name, correction) for correction in CORRECTIONS)):
        for row in ([far], [far, 0.1, -0.2]):
            new_C = torch.tensor([min(value, 0.0) for value in row]).double().requires_grad_()
            sampler_C = new_C.detach() - torch.tensor(row).double()
            seen = inputs(
                new_C, sampler_C, torch.full((len(row),), advantage).double(), [len(row)],
                Normaliser(len(row), 1, 4, 1), start_logprobs_C=sampler_C + 0.3,
                prompt_tokens_R=torch.tensor([len(row)]), reference_logprobs_C=sampler_C,
            )  # fmt: skip
            for kl in ("k2", "k3", "k3_ratio"):
                output = policy_loss(seen, Algorithm(loss=name, kl=kl, kl_coef=0.1, off_policy_mask=0.5), bounds)
                assert output.loss.isfinite()
                assert torch.autograd.grad(output.loss, new_C)[0].isfinite().all()
                assert all(value.isfinite() for value in output.sums.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_rewards_teach_nothing(name):
    output, gradient_C = fixture(name, advantages=[0.0] * 4)
    assert output.loss.item() == 0.0 and gradient_C.abs().max().item() == 0.0


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_sampler_does_not_know_has_weight_one_and_is_counted(name):
    """A row of unknown tokens alone learns as if the policy had sampled it; it is in no statistic."""
    new_C = torch.tensor([-1.0, -2.0, -0.5]).double().requires_grad_()
    sampler_C = torch.tensor([math.nan, math.nan, -0.5]).double()
    seen = inputs(
        new_C, sampler_C, torch.tensor([2.0, 2.0, -1.0]).double(), [2, 1], Normaliser(3, 2, 4, 1),
        prompt_tokens_R=torch.tensor([3, 3]),
    )  # fmt: skip
    algorithm = Algorithm(loss=name)
    output = policy_loss(seen, algorithm)
    shares_C = AGGREGATIONS[algorithm.aggregation](seen).detach()
    slopes = torch.autograd.grad(output.loss, new_C)[0]
    assert slopes.tolist() == pytest.approx((-seen.advantages_C * shares_C).tolist())
    assert output.sums["tokens"].item() == 1 and figures(output.mismatch)["rollout_kl"] == 0.0
