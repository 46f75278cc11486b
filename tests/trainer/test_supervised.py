"""A warm-up's updates against transformers: padded rows, one loss of its own, the same gradient for any ranks."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.algorithm.inputs import LossInputs, Normaliser
from grpo.algorithm.supervised import supervised_loss
from grpo.config import Config
from grpo.rollout.supervised import samples_of, taught
from grpo.trainer.model import load_policy
from grpo.trainer.packing import pack
from grpo.types import Prompt
from tests.models import VOCABULARY, random_samples, tiny_folder
from tests.ranks import free_port, run_ranks

RATE = 1e-2
ROWS = [
    Prompt(f"p:{row}", "", "", sample.prompt_ids, completion_ids=sample.output_ids)
    for row, sample in enumerate(random_samples(13))
]


def settings(folder: Path, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_length": 24},
            "rollout": {"max_tokens": 16},
            "train": {"learning_rate": RATE, "tokens_per_micro_batch": 24} | train,
        }
    )


def learn(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """For each: (loss before, gradients of the update, the step's statistics, loss after)."""
    from deepspeed.utils import safe_get_full_grad

    from grpo.algorithm.objective import SUPERVISED
    from grpo.trainer import PolicyTrainer

    answers = []
    place = (rank, world_size, rank, "cpu", "127.0.0.1", port)
    for config in configs:
        trainer = PolicyTrainer(config, *place, total_steps=10, threads=1, objective=SUPERVISED)
        gradients: dict[str, Any] = {}
        step = trainer.engine.step

        def spy(rate: float, trainer=trainer, gradients=gradients, step=step) -> Any:
            for name, param in trainer.weights.params.items():
                grad = param.grad if param.grad is not None else safe_get_full_grad(param)
                gradients[name] = grad.float().numpy(force=True).copy()
            return step(rate)

        trainer.engine.step = spy
        batch = samples_of(taught(ROWS, 1))
        before = trainer.evaluate(batch)
        stats = trainer.step(batch, step=1)
        answers.append((before, gradients, stats, trainer.evaluate(batch)))
    trainer.close()
    return answers


def padded(folder: Path) -> tuple[float, dict[str, Any]]:
    """Loss and gradient by transformers' own loss: all rows in one padded batch, labels -100 outside completions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [torch.tensor(row.token_ids + row.completion_ids) for row in ROWS]
    labels = [torch.tensor([-100] * len(row.token_ids) + list(row.completion_ids)) for row in ROWS]
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    output = model(
        input_ids=pad(ids, batch_first=True),
        attention_mask=pad(mask, batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=-100),
    )
    output.loss.backward()
    return output.loss.item(), {name: param.grad.numpy() for name, param in model.named_parameters()}


def cosine(found: dict[str, Any], expected: dict[str, Any]) -> float:
    one, other = (numpy.concatenate([side[name].ravel() for name in expected]) for side in (found, expected))
    return float(one @ other / numpy.linalg.norm(one) / numpy.linalg.norm(other))


def test_packed_micro_batches_add_up_to_padded_rows(tmp_path):
    """Without DeepSpeed: the model's packed forward and the loss alone."""
    folder = tiny_folder(tmp_path / "model")
    loss, gradients = padded(folder)
    policy = load_policy(str(folder), None, torch.float32, 1.0, checkpointing=False)
    batch = samples_of(taught(ROWS, 1))
    tokens = sum(len(row.completion_ids) for row in ROWS)
    total = 0.0
    for part in (batch[:5], batch[5:6], batch[6:]):
        packed = pack(part)
        logprobs_C, entropy_C = policy(packed)
        normaliser = Normaliser(tokens, len(batch), 16)
        fields = (packed.rollout_logprobs_C, packed.advantages_C, packed.rows_C, packed.trained_lengths_R)
        output = supervised_loss(LossInputs(logprobs_C, *fields, normaliser, entropy_C))
        output.loss.backward()
        total += output.loss.item()
    assert total == pytest.approx(loss, rel=1e-5)
    assert cosine({name: p.grad.numpy() for name, p in policy.causal_lm.named_parameters()}, gradients) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_are_those_of_padded_rows(world_size, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    loss, gradients = padded(folder)
    configs = [settings(folder, zero_stage=stage) for stage in ((1, 3) if world_size > 1 else (1,))]
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    for before, found, stats, after in (
        run for rank in run_ranks(world_size, learn, free_port(), configs) for run in rank
    ):
        assert cosine(found, gradients) > 0.9999
        assert before["eval/loss"] == pytest.approx(loss, rel=1e-5)
        assert stats["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert stats["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert after["eval/loss"] < loss
        assert not {"train/ratio_max", "train/rollout_kl", "train/approx_kl"} & set(stats)
        assert 0 < stats["train/entropy"] < math.log(VOCABULARY)
