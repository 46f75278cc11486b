"""Optimizer and weights in host memory, as far as the CPU backend of DeepSpeed goes: the same training, bit for bit
resumed, at every stage that takes it, and states that move to and from trainers without it.

Where the states lie is no question on a CPU; what DeepSpeed does with them is: other buffers, another way of gradients.
"""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from grpo.config import Config
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_adapter import use
from tests.trainer.test_policy_trainer import settings as any_settings
from tests.trainer.test_policy_trainer import skip_updates
from tests.trainer.test_state import (
    LAST,
    SAVED,
    assert_equal_bits,
    folder_of,
    open_trainer,
    read,
    settings,
    tensors,
    train,
    write,
)

OPTIMIZER, BOTH = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_param": "cpu"}
WAYS = [(2, OPTIMIZER), (3, OPTIMIZER), (3, BOTH)]
DTYPES = ("float32", "bfloat16")
KINDS = [(stage, dtype, keys) for dtype in DTYPES for stage, keys in WAYS]
EACH = KINDS[::2]  # each way once, in either type


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), kind="qwen2")


def train_on(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """Four steps of two updates and several micro-batches each: statistics, then fp32 weights and what is sent."""
    answers = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        stats = train(trainer, 1, LAST)
        params = trainer.weights.params.items()
        masters = {name: trainer.engine.shards.gather(param, "master").numpy().copy() for name, param in params}
        sent = {name: tensor.float().numpy(force=True).copy() for name, tensor in trainer.iter_weights()}
        answers.append((stats, masters, sent))
    trainer.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_trains_as_without(world_size: int, model: Path) -> None:
    small = {"tokens_per_micro_batch": 24}
    offloaded = [settings(model, stage, dtype, **keys, **small) for stage, dtype, keys in KINDS]
    without = list(dict.fromkeys((stage, dtype) for stage, dtype, _ in KINDS))
    plainly = [settings(model, *kind, **small) for kind in without]
    answers = run_ranks(world_size, train_on, free_port(), offloaded + plainly)[0]
    for kind, found in zip(KINDS, answers, strict=False):
        expected = answers[len(KINDS) + without.index(kind[:2])]
        for row, other in zip(found[0], expected[0], strict=True):
            assert row["train/updates"] == other["train/updates"] == 2.0
            assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5, abs=1e-6), kind
            assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-5), kind
        for name, master in expected[1].items():
            assert found[1][name] == pytest.approx(master, abs=1e-6), (kind, name)
        for name, sent in expected[2].items():
            rounded = torch.from_numpy(found[1][name]).to(getattr(torch, kind[1])).float().numpy()
            assert numpy.array_equal(found[2][name], rounded), (kind, name)
            assert found[2][name] == pytest.approx(sent, abs=1e-6 if kind[1] == "float32" else 4e-3), (kind, name)


@pytest.mark.slow
def test_a_resume_is_exact_and_states_move_to_and_from_trainers_without(model: Path, tmp_path: Path) -> None:
    jobs = [
        (settings(model, stage, dtype, **keys), folder_of(tmp_path, "saved", *map(str, (number, stage, dtype))))
        for number, (stage, dtype, keys) in enumerate(EACH)
    ]
    first = run_ranks(2, write, free_port(), jobs)[0]
    again = [(config, folder, folder_of(tmp_path, "again", number)) for number, (config, folder) in enumerate(jobs)]
    moved = [
        (
            settings(model, 1 if stage == 3 else 3, dtype),
            jobs[number][1],
            folder_of(tmp_path, "moved", number),
        )
        for number, (stage, dtype, _) in enumerate(EACH)
    ]
    back = [
        (config, folder, folder_of(tmp_path, "back", number))
        for number, ((config, _), (_, _, folder)) in enumerate(zip(jobs, moved, strict=True))
    ]
    answers = run_ranks(2, read, free_port(), again + moved + back)[0]
    for number, kind in enumerate(EACH):
        _, saved, _, stats, last = first[number]
        bits = tensors(jobs[number][1])
        assert {bits[name].view(torch.float32).item() for name in bits if name.startswith("step/")} == {2.0 * SAVED}
        for others in (again, moved, back):
            assert_equal_bits(tensors(others[number][2]), bits)
        for loaded, _, later, end in (answers[number], answers[number + 2 * len(EACH)]):
            assert loaded == saved and later == stats and end == last, kind
        assert answers[number + len(EACH)][0] == saved, kind


@pytest.mark.slow
def test_an_update_that_is_not_finite_leaves_no_trace(model: Path) -> None:
    configs = [
        any_settings(
            model,
            model={"dtype": dtype},
            train={"zero_stage": stage, "tokens_per_micro_batch": 24, "max_skipped_updates": 2, **keys},
        )
        for stage, dtype, keys in EACH
    ]
    for per_rank in run_ranks(2, skip_updates, free_port(), configs):
        for kind, found in zip(EACH, per_rank, strict=True):
            assert found["unmoved"], kind
            assert [stats["train/skipped"] for stats in found["skipped"]] == [1.0, 1.0, 1.0], kind
            seconds = [{k: v for k, v in found[run][0].items() if "seconds" not in k} for run in ("good", "again")]
            assert found["good"][1] == found["again"][1] and seconds[0] == seconds[1], kind


def kept_beside(rank: int, world_size: int, port: int, configs: list[Config], scratch: Path) -> list[bool]:
    """Whether the copy in host memory that is written beside training has the very files of a save."""
    same = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        trainer.step(random_samples(13), 1)
        folders = [scratch / f"{number}-{name}" for name in ("beside", "saved")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        trainer.snapshot(1)
        trainer.write(folders[0], 1)
        trainer.save_state(folders[1], 1)
        files = [path.relative_to(folders[1]) for path in folders[1].rglob("*") if path.is_file()]
        mine = [file for file in files if rank == 0 or f"{rank:05d}" in file.name]
        same.append(all((folders[0] / file).read_bytes() == (folders[1] / file).read_bytes() for file in mine))
        scores = trainer.logprobs(range(20))
        trainer.perturb(0.2, 0)
        moved = trainer.logprobs(range(20))
        trainer.restore()
        same.append(moved != scores and trainer.logprobs(range(20)) == scores)
    trainer.close()
    return same


@pytest.mark.slow
def test_copies_beside_training_and_the_self_test_s_perturbation(model: Path, tmp_path: Path) -> None:
    configs = [settings(model, stage, dtype, **keys) for stage, dtype, keys in EACH]
    assert run_ranks(2, kept_beside, free_port(), configs, tmp_path) == [[True] * 2 * len(EACH)] * 2


@pytest.mark.slow
def test_frozen_weights_below_an_adapter_in_host_memory(model: Path, tmp_path: Path) -> None:
    """The same factors as with the weights on the device, and an exact resume."""
    runs = [
        any_settings(
            model,
            model={"dtype": dtype},
            algorithm={"kl_coef": 1e-3},
            train={"zero_stage": 3, "lora": {"rank": 4, "alpha": 6.0}, **keys},
        )
        for dtype in DTYPES
        for keys in ({}, BOTH)
    ]
    for plainly, found in zip(*[iter(run_ranks(2, use, free_port(), runs, tmp_path)[0])] * 2, strict=True):
        assert found["same"] and found["drifted"]
        assert found["stats"]["train/loss"] == plainly["stats"]["train/loss"]
        for name in ("factors", "learned", "merged"):
            for key, value in plainly[name].items():
                assert numpy.array_equal(found[name][key], value), (name, key)
