"""TRL's own code on random rows: value and gradient, pinned; in the environment of `make bench` also made anew."""

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.algorithm.correction import NONE, Bounds
from grpo.algorithm.inputs import Normaliser
from grpo.algorithm.loss import policy_loss
from grpo.config import Algorithm
from tests.algorithm import trl_reference as trl
from tests.algorithm.test_loss import flat, inputs, per_token

Outcome = tuple[float, list[float]]
PINNED = Path(__file__).with_name("trl_reference.json")
BENCH = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
DRAWS = 40
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
    expected = json.loads(PINNED.read_text())[name][seed]
    loss, gradient = our_loss(*OURS[name], trl.random_case(seed))
    assert loss == pytest.approx(expected["loss"], abs=2e-9)
    assert gradient == pytest.approx(expected["gradient"], abs=2e-9)


def our_loss(settings: dict[str, object], bounds: Bounds, case: dict[str, list[list[float]]]) -> Outcome:
    """Value and gradient by logprob, row behind row."""
    lengths = [len(row) for row in case["new"]]
    new_C, old_C = flat(case["new"]).requires_grad_(), flat(case["old"])
    sampler_C = old_C if bounds == NONE else flat(case["sampler"])
    advantages_C = per_token([advantage for (advantage,) in case["advantages"]], lengths)
    normaliser = Normaliser(sum(lengths), len(lengths), trl.LONGEST, prompts=1)
    more = {"start_logprobs_C": old_C, "reference_logprobs_C": flat(case["reference"])}
    seen = inputs(new_C, sampler_C, advantages_C, lengths, normaliser, **more)
    output = policy_loss(seen, Algorithm.model_validate(settings), bounds)
    return output.loss.item(), torch.autograd.grad(output.loss, new_C)[0].tolist()


def test_the_same_variants_are_compared():
    assert list(OURS) == list(trl.VARIANTS) == list(json.loads(PINNED.read_text()))


def run_trl(*arguments: str) -> Any:
    done = subprocess.run([BENCH, trl.__file__, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="needs .venv-bench, which `make bench` makes")
def test_the_pinned_numbers_are_what_trl_computes_now():
    found, pinned = run_trl(), json.loads(PINNED.read_text())
    for name, outcomes in pinned.items():
        for now, then in zip(found[name], outcomes, strict=True):
            assert now["loss"] == pytest.approx(then["loss"], abs=2e-9)
            assert now["gradient"] == pytest.approx(then["gradient"], abs=2e-9)


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="needs .venv-bench, which `make bench` makes")
def test_other_rows_and_knobs_each_time_give_what_trl_gives(tmp_path):
    first = random.randrange(2**32)
    drawn = [(name, first + number, *draw(name, first + number)) for name in OURS for number in range(DRAWS)]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([[theirs, case] for _, _, theirs, _, _, case in drawn]))
    for (name, seed, theirs, ours, bounds, case), expected in zip(drawn, run_trl(str(asked)), strict=True):
        loss, gradient = our_loss(ours, bounds, case)
        told = f"draw({name!r}, {seed}): {theirs}"
        assert loss == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9), told
        assert gradient == pytest.approx(expected["gradient"], rel=1e-9, abs=1e-9), told


def draw(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any], Bounds, dict[str, list[list[float]]]]:
    """The variant with other knobs, as TRL and as we write them, and rows of other lengths and distances.

    Every third case has rows of advantage 0, and the widest put a token's ratio far outside of every bound.
    """
    rng = random.Random(f"{name} {seed}")
    lengths = [rng.randint(1, trl.LONGEST) for _ in range(rng.randint(1, 12))]
    case = trl.random_case(seed, lengths, spread=rng.choice((0.01, 0.3, 1.0, 5.0)))
    if seed % 3 == 0:
        case["advantages"] = [[rng.choice((0.0, advantage))] for (advantage,) in case["advantages"]]
    settings, bounds = OURS[name]
    theirs, ours = dict(trl.VARIANTS[name]), dict(settings)
    if "clip_high" in ours or ours["loss"] == "dapo":
        high = ours["clip_high"] = theirs["epsilon_high"] = rng.uniform(1e-4, 0.5)
        if ours["loss"] == "cispo":
            theirs["epsilon_high"] = 1.0 + high  # TRL's is the cap itself
        else:
            ours["clip_low"] = theirs["epsilon"] = rng.uniform(1e-4, 0.5)
    for key, name_there, low, top in (
        ("dual_clip", "delta", 1.5, 4.0),
        ("kl_coef", "beta", 1e-4, 1.0),
        ("off_policy_mask", "off_policy_mask_threshold", 0.0, 1.0),
    ):
        if key in ours:
            ours[key] = theirs[name_there] = rng.uniform(low, top)
    if ours["loss"] == "sapo":
        pair = ours["sapo_temperature"] = [rng.uniform(0.5, 3.0), rng.uniform(0.5, 3.0)]
        theirs["sapo_temperature_pos"], theirs["sapo_temperature_neg"] = pair
    if ours["loss"] == "vespo":
        for key in ("k", "lambda"):
            pair = ours[f"vespo_{key}"] = [rng.uniform(0.5, 4.0), rng.uniform(0.5, 4.0)]
            theirs[f"vespo_{key}_pos"], theirs[f"vespo_{key}_neg"] = pair
    if "cap" in theirs:
        theirs["cap"] = rng.uniform(0.5, 5.0)
        bounds = replace(bounds, high=theirs["cap"])
    return theirs, ours, bounds, case
