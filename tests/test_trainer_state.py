"""The trainer's state: what is saved is all, it is read bit for bit by any ranks and stage, and damage is named."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from grpo.config import Config
from grpo.weights.digest import digest
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port, run_ranks, stop_server

ROWS = random_samples(13, advantages=(1.0, -1.0, 0.0, 0.5, -2.0))
DTYPES = ("float32", "bfloat16")
KINDS = [(stage, dtype) for dtype in DTYPES for stage in (0, 1, 2, 3)]
SAVED, LAST = 2, 4


@pytest.fixture(scope="module", autouse=True)
def _no_process_left():
    yield
    stop_server()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), kind="qwen2")


def settings(model: Path, stage: int, dtype: str, **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "dtype": dtype, "max_length": 24},
            "rollout": {"max_tokens": 16},
            "train": {
                "learning_rate": 1e-3,
                "tokens_per_micro_batch": 48,
                "zero_stage": stage,
                "minibatches": 2,
                "weight_decay": 0.1,
                "schedule": "linear",
            }
            | train,
            "sync": {"max_mismatch": 100},  # random rows fit no weights
        }
    )


def open_trainer(config: Config, rank: int, world_size: int, port: int, threads: int = 1) -> Any:
    from grpo.trainer import PolicyTrainer

    return PolicyTrainer(config, rank, world_size, rank, "cpu", "127.0.0.1", port, total_steps=10, threads=threads)


def weights(trainer: Any) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in trainer.iter_weights()}


def train(trainer: Any, first: int, last: int) -> list[dict[str, float]]:
    rows = [trainer.step(ROWS, step) for step in range(first, last + 1)]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def own_shards(trainer: Any) -> dict[str, Any]:
    """What this rank itself holds of every parameter: (start, values) by kind."""
    found: dict[str, Any] = {}
    for name, param in trainer.weights.params.items():
        shard = trainer.engine.shards.of(param)
        found |= {f"{kind}/{name}": (shard.start, view.numpy().copy()) for kind, view in shard.views.items()}
        found[f"step/{name}"] = (0, shard.step.numpy().reshape(1).copy())
    return found


def write(rank: int, world_size: int, port: int, jobs: list[tuple[Config, Path]]) -> list[Any]:
    """Trains, saves, trains on: (own shards as saved, weights as saved, later stats, last weights) of each job."""
    answers = []
    for config, folder in jobs:
        trainer = open_trainer(config, rank, world_size, port)
        train(trainer, 1, SAVED)
        for param in trainer.weights.params.values():
            trainer.engine.shards.of(param).views["exp_avg"][:1] = -0.0  # a sign that adding numbers loses
        random.seed(rank + 7)
        trainer.save_state(folder, SAVED)
        saved = own_shards(trainer), weights(trainer), random.getstate()
        answers.append((*saved, train(trainer, SAVED + 1, LAST), weights(trainer)))
    trainer.close()
    return answers


def read(rank: int, world_size: int, port: int, jobs: list[tuple[Config, Path, Path]]) -> list[Any]:
    """Loads, saves what was loaded, trains on: (weights as loaded, later stats, last weights, generator) of each."""
    answers = []
    for config, folder, again in jobs:
        trainer = open_trainer(config, rank, world_size, port)
        trainer.load_state(folder, SAVED)
        loaded, generator = weights(trainer), random.getstate()
        trainer.save_state(again, SAVED)
        answers.append((loaded, generator, train(trainer, SAVED + 1, LAST), weights(trainer)))
    trainer.close()
    return answers


def folder_of(root: Path, *parts: object) -> Path:
    path = root / "-".join(map(str, parts))
    path.mkdir()
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a state, as bits."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = {name: tensor.view(torch.int32) for name, tensor in load_file(path).items()}
        assert not set(part) & set(found)
        found |= part
    return found


def assert_equal_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """For 1 and 2 ranks and every stage and dtype: (folder, what each rank answered)."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for ranks in (1, 2):
        jobs = [(settings(model, *kind), folder_of(root, ranks, *kind)) for kind in KINDS]
        answers = run_ranks(ranks, write, free_port(), jobs)
        for number, kind in enumerate(KINDS):
            found[ranks, *kind] = jobs[number][1], [answer[number] for answer in answers]
    return found


@pytest.mark.slow
def test_files_hold_what_the_ranks_hold(saved):
    """Against the ranks' own pieces, put together here; a -0.0 stays one."""
    for (ranks, stage, dtype), (folder, answers) in saved.items():
        found = tensors(folder)
        assert {name.partition("/")[0] for name in found} == {"master", "exp_avg", "exp_avg_sq", "step"}
        negative_zeros = 0
        for name, bits in found.items():
            whole = bits.view(torch.float32).flatten().numpy()
            for answer in answers:
                start, values = answer[0][name]
                part = whole[start : start + len(values)]
                assert part.tobytes() == values.tobytes(), (ranks, stage, dtype, name)
                negative_zeros += int((numpy.signbit(values) & (values == 0.0)).sum())
            if name.startswith("step/"):
                assert whole.tolist() == [2.0 * SAVED]
            if name.startswith("exp_avg/"):
                assert abs(whole).max() > 0.0
        assert negative_zeros > 0
        low = load_file(folder / "policy" / "model.safetensors")
        for name, tensor in low.items():
            master = found[f"master/{name}"].view(torch.float32)
            assert torch.equal(tensor, master.to(getattr(torch, dtype))), name
        header = json.loads((folder / "trainer.json").read_text())
        assert (header["world_size"], header["zero_stage"], header["dtype"]) == (ranks, stage, dtype)
        assert sorted(path.name for path in folder.glob("rng-*")) == [f"rng-{rank:05d}.json" for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "writer"), [(1, 1), (2, 2), (1, 2), (4, 2), (2, 1), (3, 1)])
def test_resume_is_exact(reader, writer, saved, model, tmp_path):
    """As many ranks: every later number is the same. Others: what was loaded is, and the rest within rounding."""
    kinds = KINDS if reader in (1, 2) else [(1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")]
    jobs = [(settings(model, *k), saved[writer, *k][0], folder_of(tmp_path, *k)) for k in kinds]
    answers = run_ranks(reader, read, free_port(), jobs)
    for number, kind in enumerate(kinds):
        folder, written = saved[writer, *kind]
        assert_equal_bits(tensors(jobs[number][2]), tensors(folder))
        for rank, answer in enumerate(answers):
            loaded, generator, stats, last = answer[number]
            _, old_weights, _, old_stats, old_last = written[0]
            assert loaded == old_weights, kind
            assert rank >= writer or generator == written[rank][2]
            if reader == writer:
                assert stats == old_stats and last == old_last, kind
            loose = {"float32": 1e-4, "bfloat16": 0.3}[kind[1]]  # rows that fit no weights are sensitive to rounding
            for row, old in zip(stats, old_stats, strict=True):
                assert row["train/loss"] == pytest.approx(old["train/loss"], abs=0.1 * loose), kind
                assert row["train/grad_norm"] == pytest.approx(old["train/grad_norm"], rel=loose), kind
        assert len({str(answer[number][1]) for answer in answers}) == reader  # no two ranks draw the same numbers
