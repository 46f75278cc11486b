"""What TRL's own GRPOTrainer computes on random rows: `python tests/algorithm/trl_reference.py` prints it as JSON.

It runs in the environment of `make bench`, which has TRL and not this program; the numbers are kept beside it. With a
file, a JSON list of pairs of settings and case, it prints what TRL computes of each of those instead.
"""

import collections
import json
import random
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTHS = (5, 2, 1, 6, 3)
LONGEST = 8
REWARDS = (1.0, 0.0, 0.5, 0.0, 1.0)
SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon_high": 0.2},
    "grpo k3": {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.04},
    "grpo k3_ratio": {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.04, "use_bias_correction_kl": True},
    "dapo": {"loss_type": "dapo"},
    "dapo dual": {"loss_type": "dapo", "delta": 1.5},
    "dapo tis": {"loss_type": "dapo", "cap": 2.0},
    "dapo mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.05},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_high": 0.2},
    "gspo": {"loss_type": "grpo", "level": "sequence", "epsilon": 0.1, "epsilon_high": 0.1},
    "luspo": {"loss_type": "luspo", "level": "sequence", "epsilon": 0.1, "epsilon_high": 0.1},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
}


def random_case(seed: int, lengths: Sequence[int] = LENGTHS, spread: float = 1.0) -> dict[str, list[list[float]]]:
    """Logprobs of the tokens of each row, by who gives them, and each row's advantage.

    How far these are apart grows with the spread.
    """
    rng = random.Random(seed)

    def rows(deviation: float, centre: float = 0.0) -> list[list[float]]:
        return [[round(rng.gauss(centre, deviation), 6) for _ in range(length)] for length in lengths]

    old = rows(0.6, -2.0)
    near = {"new": rows(0.4 * spread), "sampler": rows(0.3 * spread), "reference": rows(0.3 * spread)}
    moved = {
        name: [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(old, by, strict=True)]
        for name, by in near.items()
    }
    advantages = [round(rng.gauss(0.0, 1.0), 6) for _ in lengths]
    return {"old": old, **moved, "advantages": [[advantage] for advantage in advantages]}


def trl_loss(settings: dict[str, Any], case: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Value and gradient by logprob, row behind row."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    lengths = [len(row) for row in case["new"]]
    width = max(lengths)

    def padded(name: str) -> Any:
        rows = [row + [0.0] * (width - len(row)) for row in case[name]]
        return torch.tensor(rows, dtype=torch.float64)

    mask = torch.tensor([[place < length for place in range(width)] for length in lengths]).double()
    new = padded("new").requires_grad_()
    args = {
        **{"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1},
        **{"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        **{"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    }
    same = types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(**args | {key: settings[key] for key in args if key in settings}),
        accelerator=same,
        model=types.SimpleNamespace(training=True),
        loss_type=settings["loss_type"],
        importance_sampling_level=settings.get("level", "token"),
        epsilon_low=settings.get("epsilon", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.28),
        beta=settings.get("beta", 0.0),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        use_vllm="cap" in settings,
        vllm_importance_sampling_correction=True,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    old, sampler = padded("old"), padded("sampler")
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        **{"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask},
        **{"advantages": torch.tensor(case["advantages"], dtype=torch.float64)[:, 0], "old_per_token_logps": old},
        **{"ref_per_token_logps": padded("reference"), "num_items_in_batch": mask.sum()},
    }
    if "cap" in settings:
        inputs["importance_sampling_ratio"] = (old - sampler).exp().clamp(max=settings["cap"])
    if "off_policy_mask_threshold" in settings:
        inputs["sampling_per_token_logps"] = sampler
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, new)
    return {"loss": loss.item(), "gradient": gradient[mask.bool()].tolist()}


def main() -> None:
    """All variants on all rows, or what a file asks for."""
    if sys.argv[1:]:
        asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        print(json.dumps([trl_loss(settings, case) for settings, case in asked]))
        return
    cases = {seed: random_case(seed) for seed in SEEDS}
    found = {name: [trl_loss(settings, cases[seed]) for seed in SEEDS] for name, settings in VARIANTS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
