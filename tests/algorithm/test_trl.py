"""TRL's own code on random rows: value and gradient, pinned; in the environment of `make bench` also made anew."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from grpo.algorithm.correction import NONE, Bounds
from grpo.algorithm.inputs import Normaliser
from grpo.algorithm.loss import policy_loss
from grpo.config import Algorithm
from tests.algorithm import trl_reference as trl
from tests.algorithm.test_loss import flat, inputs, per_token

PINNED = Path(__file__).with_name("trl_reference.json")
BENCH = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
OURS: dict[str, tuple[dict[str, object], Bounds]] = {
    "grpo": ({"loss": "grpo", "clip_high": 0.2}, NONE),
    "grpo k3": ({"loss": "grpo", "clip_high": 0.2, "kl_coef": 0.04}, NONE),
    "grpo k3_ratio": ({"loss": "grpo", "clip_high": 0.2, "kl_coef": 0.04, "kl": "k3_ratio"}, NONE),
    "dapo": ({"loss": "dapo"}, NONE),
    "dapo dual": ({"loss": "dapo", "dual_clip": 1.5}, NONE),
    "dapo tis": ({"loss": "dapo"}, Bounds("tis", 0.0, 2.0)),
    "dapo mask": ({"loss": "dapo", "off_policy_mask": 0.05}, Bounds("tis", 1.0, 1.0)),
    "dr_grpo": ({"loss": "dr_grpo", "clip_high": 0.2}, NONE),
    "gspo": ({"loss": "gspo", "clip_low": 0.1, "clip_high": 0.1}, NONE),
    "luspo": ({"loss": "luspo", "clip_low": 0.1, "clip_high": 0.1}, NONE),
    "cispo": ({"loss": "cispo", "clip_high": 0.3}, NONE),
    "sapo": ({"loss": "sapo"}, NONE),
    "vespo": ({"loss": "vespo"}, NONE),
}


@pytest.mark.parametrize("seed", trl.SEEDS)
@pytest.mark.parametrize("name", OURS)
def test_losses_and_gradients_are_those_of_trl(name, seed):
    settings, bounds = OURS[name]
    case, lengths = trl.random_case(seed), list(trl.LENGTHS)
    new_C, old_C = flat(case["new"]).requires_grad_(), flat(case["old"])
    sampler_C = old_C if bounds == NONE else flat(case["sampler"])
    advantages_C = per_token([advantage for (advantage,) in case["advantages"]], lengths)
    normaliser = Normaliser(sum(lengths), len(lengths), trl.LONGEST, prompts=1)
    more = {"start_logprobs_C": old_C, "reference_logprobs_C": flat(case["reference"])}
    seen = inputs(new_C, sampler_C, advantages_C, lengths, normaliser, **more)
    output = policy_loss(seen, Algorithm.model_validate(settings), bounds)
    expected = json.loads(PINNED.read_text())[name][seed]
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert torch.autograd.grad(output.loss, new_C)[0].tolist() == pytest.approx(expected["gradient"], abs=1e-6)


def test_the_same_variants_are_compared():
    assert list(OURS) == list(trl.VARIANTS) == list(json.loads(PINNED.read_text()))


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="needs .venv-bench, which `make bench` makes")
def test_the_pinned_numbers_are_what_trl_computes_now():
    done = subprocess.run([BENCH, trl.__file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, pinned = json.loads(done.stdout), json.loads(PINNED.read_text())
    for name, outcomes in pinned.items():
        for now, then in zip(found[name], outcomes, strict=True):
            assert now["loss"] == pytest.approx(then["loss"], abs=1e-8)
            assert now["gradient"] == pytest.approx(then["gradient"], abs=1e-8)
