"""What is changed inside of DeepSpeed changes no bit."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_policy_trainer import measured, moving_parts, open_trainer, settings


def trained_twice(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """For each configuration, as DeepSpeed is and as we change it: three steps, the second of which is thrown away."""
    from grpo.trainer import deepspeed

    ours = deepspeed.add_in_place, deepspeed.engine_config
    theirs = (lambda optimizer: None), (lambda *given: ours[1](*given) | {"bf16": {"enabled": given[1]}})
    answers = []
    for config in configs:
        states = []
        for deepspeed.add_in_place, deepspeed.engine_config in (theirs, ours):
            trainer = open_trainer(config, rank, world_size, port)
            backward, rows = trainer.engine.backward, []
            for step in (1, 2, 3):
                poison = math.inf if step == 2 and rank == 1 else 1.0
                trainer.engine.backward = lambda loss, last, poison=poison, do=backward: do(loss * poison, last)
                rows.append(measured(trainer.step(random_samples(13, seed=step), step)))
            states.append((rows, moving_parts(trainer)))
        answers.append(states)
    trainer.close()
    return answers


@pytest.mark.slow
def test_adding_in_place_changes_no_bit(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    cases = [(1, False), (1, True)]
    configs = [
        settings(
            folder,
            model={"dtype": "bfloat16"},
            train={"zero_stage": stage, "tokens_per_micro_batch": 24, "gradient_checkpointing": again},
        )
        for stage, again in cases
    ]
    for answers in run_ranks(2, trained_twice, free_port(), configs):
        for (theirs, ours), case in zip(answers, cases, strict=True):
            assert theirs == ours, case
            assert [row["train/skipped"] for row in ours[0]] == [0.0, 1.0, 0.0], case


def loaded(rank: int, world_size: int, port: int, configs: list[Config]) -> list[bool]:
    """Whether torch has loaded its compiler, after each start."""
    answers = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        answers.append("torch._inductor.compile_fx" in sys.modules)
    trainer.close()
    return answers


@pytest.mark.slow
def test_a_start_without_compiled_layers_loads_no_compiler(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    configs = [settings(folder, train={"zero_stage": stage}) for stage in range(4)]
    assert run_ranks(1, loaded, free_port(), configs) == [[False] * 4]
