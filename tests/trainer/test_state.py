"""The trainer's state: what is saved is all, it is read bit for bit by any ranks and stage, and damage is named."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config import Config
from grpo.errors import CheckpointError, NonFiniteError
from grpo.trainer.state import plan_files
from grpo.types import TensorRecord
from grpo.weights.digest import digest
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port, run_ranks

ROWS = random_samples(13, advantages=(1.0, -1.0, 0.0, 0.5, -2.0))
DTYPES = ("float32", "bfloat16")
KINDS = [(stage, dtype) for dtype in DTYPES for stage in (0, 1, 2, 3)]
FEW = [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]
SAVED, LAST = 2, 4


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
    """For 2 ranks every stage and dtype, for 1 rank a few: (folder, what each rank answered)."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for ranks, kinds in ((1, FEW), (2, KINDS)):
        jobs = [(settings(model, *kind), folder_of(root, ranks, *kind)) for kind in kinds]
        answers = run_ranks(ranks, write, free_port(), jobs)
        for number, kind in enumerate(kinds):
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
    kinds = {(2, 2): KINDS, (1, 1): FEW}.get((reader, writer), FEW[2:] if reader <= 2 else FEW[3:])
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


@pytest.mark.slow
def test_a_state_moves_between_stages_and_dtypes(saved, model, tmp_path):
    """Saved by 2 ranks at stage 3 in bf16: the same fp32 state at any stage, and its weights in another dtype."""
    folder = saved[2, 3, "bfloat16"][0]
    kinds = [(0, "bfloat16"), (1, "bfloat16"), (2, "float32")]
    jobs = [(settings(model, *k), folder, folder_of(tmp_path, *k)) for k in kinds]
    run_ranks(1, read, free_port(), jobs)
    for (_, dtype), (_, _, again) in zip(kinds, jobs, strict=True):
        assert_equal_bits(tensors(again), tensors(folder))
        masters = {name: bits.view(torch.float32) for name, bits in tensors(folder).items() if "master/" in name}
        for name, tensor in load_file(again / "policy" / "model.safetensors").items():
            assert torch.equal(tensor, masters[f"master/{name}"].to(getattr(torch, dtype)))


def edit_file(change: Callable[[dict[str, torch.Tensor]], object], number: int = 0) -> Callable[[Path], object]:
    """A damage that changes one file's tensors."""

    def damage(folder: Path) -> None:
        path = folder / f"optimizer-{number:05d}-000.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return damage


def edit_header(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "trainer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


FIRST = "model.embed_tokens.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "gone": (lambda f: (f / "optimizer-00001-000.safetensors").unlink(), ["optimizer-00001-000.safetensors"]),
    "empty": (lambda f: (f / "optimizer-00001-000.safetensors").write_bytes(b""), ["optimizer-00001-000.safetensors"]),
    "cut": (
        lambda f: (f / "optimizer-00000-000.safetensors").write_bytes(
            (f / "optimizer-00000-000.safetensors").read_bytes()[:-100]
        ),
        ["optimizer-00000-000.safetensors"],
    ),
    "moment": (edit_file(lambda t: t.pop(f"exp_avg/{FIRST}")), ["optimizer-00000-000", f"exp_avg/{FIRST}"]),
    "step": (edit_file(lambda t: t.pop(f"step/{FIRST}")), ["optimizer-00000-000", f"step/{FIRST}"]),
    "shape": (
        edit_file(lambda t: t.update({f"master/{FIRST}": t[f"master/{FIRST}"][:-1].clone()})),
        [f"master/{FIRST}", "(60, 32)", "(61, 32)"],
    ),
    "dtype": (
        edit_file(lambda t: t.update({f"master/{FIRST}": t[f"master/{FIRST}"].bfloat16()})),
        [f"master/{FIRST}", "torch.bfloat16"],
    ),
    "header gone": (lambda f: (f / "trainer.json").unlink(), ["trainer.json"]),
    "header no JSON": (lambda f: (f / "trainer.json").write_text("{"), ["trainer.json"]),
    "header a list": (lambda f: (f / "trainer.json").write_text("[]"), ["trainer.json"]),
    "format": (edit_header(format=99), ["trainer.json", "format 1", "99"]),
    "other model": (edit_header(files={"odd.weight": "x"}), ["trainer.json", "model.path", FIRST]),
    "path": (edit_header(files=dict.fromkeys(("a",), 3)), ["trainer.json"]),
    "rng gone": (lambda f: [path.unlink() for path in f.glob("rng-*")], ["rng-00000.json"]),
    "rng cut": (
        lambda f: [path.write_text('{"python": [3, [1], null]}') for path in f.glob("rng-*")],
        ["rng-00000.json"],
    ),
}


def refuse(rank: int, world_size: int, port: int, config: Config, good: Path, bad: dict[str, Path]) -> dict[str, str]:
    """What each damaged folder's load says when only rank 0 meets the damage; a good one loads afterwards."""
    trainer = open_trainer(config, rank, world_size, port)
    found = {}
    for name, folder in bad.items():
        with pytest.raises(CheckpointError) as caught:
            trainer.load_state(folder if rank == 0 else good)
        found[name] = str(caught.value)
    trainer.load_state(good)
    found["weights"] = str(weights(trainer))
    trainer.close()
    return found


@pytest.mark.slow
def test_damage_is_named_and_all_ranks_stop(saved, model, tmp_path):
    good, answers = saved[2, 1, "float32"]
    bad = {name: tmp_path / name for name in DAMAGES}
    for name, folder in bad.items():
        shutil.copytree(good, folder, ignore=shutil.ignore_patterns("policy"))
        DAMAGES[name][0](folder)
    config = settings(model, 1, "float32")
    for found in run_ranks(2, refuse, free_port(), config, good, bad):
        for name, (_, words) in DAMAGES.items():
            assert [word for word in words if word not in found[name]] == [], found[name]
            assert "model.path" in found[name] or "remove this checkpoint" in found[name] or name == "format"
        assert found["weights"] == str(answers[0][1])


def spoil(rank: int, world_size: int, port: int, configs: list[Config], root: Path) -> list[dict[str, Any]]:
    """Saves of a model that is not finite, or that one rank cannot write; and the counters of a good save."""
    from grpo.trainer.deepspeed import gathered

    answers = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        param = trainer.weights.params["model.norm.weight"]
        found: dict[str, Any] = {}
        for kind, value in {
            "weight": math.nan,
            "master": math.nan,
            "exp_avg": -math.inf,
            "exp_avg_sq": math.inf,
        }.items():
            with gathered([param], modify=True):
                view = param.data if kind == "weight" else trainer.engine.shards.of(param).views[kind]
                kept = view.clone()
                if rank == 1 or kind == "weight":  # stages 1 and 2 keep the last parameter on the last rank
                    view[-1:] = value
            folder = root / f"{number}-{kind}"
            folder.mkdir(exist_ok=True)
            with pytest.raises(NonFiniteError) as caught:
                trainer.save_state(folder)
            found[kind] = str(caught.value), sorted(folder.iterdir())
            with gathered([param], modify=True):
                (param.data if kind == "weight" else view).copy_(kept)

        folder = root / f"{number}-blocked"
        Path(folder, "optimizer-00001-000.safetensors").mkdir(parents=True, exist_ok=True)
        with pytest.raises(CheckpointError) as blocked:
            trainer.save_state(folder)
        found["blocked"] = str(blocked.value), Path(folder, "trainer.json").exists()

        trainer.budget.in_row = 2
        good = root / f"{number}-good"
        good.mkdir(exist_ok=True)
        trainer.save_state(good)
        trainer.budget.in_row = 0
        trainer.load_state(good)
        found["in_row"] = trainer.budget.in_row
        answers.append(found)
    trainer.close()
    return answers


@pytest.mark.slow
def test_what_is_not_finite_or_not_writable_is_refused_by_all_ranks(model, tmp_path):
    configs = [settings(model, *kind) for kind in [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]]
    for per_rank in run_ranks(2, spoil, free_port(), configs, tmp_path):
        for config, found in zip(configs, per_rank, strict=True):
            for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
                message, left = found[kind]
                assert "model.norm.weight" in message and "only a finite model is saved" in message
                assert left == []
                assert f"{kind} of" in message or kind == "master" and config.train.zero_stage == 0
            message, header = found["blocked"]
            assert "rank 1 failed" in message and "checkpoint.dir" in message and not header
            assert found["in_row"] == 2


def compute(rank: int, world_size: int, port: int, config: Config, batch: list[Any]) -> Any:
    trainer = open_trainer(config, rank, world_size, port, threads=2)
    stats = [trainer.step(batch, step) for step in (1, 2)]
    answer = [{key: value for key, value in row.items() if "seconds" not in key} for row in stats], weights(trainer)
    trainer.close()
    return answer


@pytest.mark.slow
def test_two_processes_with_two_threads_compute_the_same_bits(tmp_path):
    """A model and rows that are large enough for torch to share the work between threads."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    config = settings(tiny_folder(tmp_path / "model", **sizes), 1, "bfloat16", tokens_per_micro_batch=256)
    rows = random_samples(24)
    first, again = (run_ranks(1, compute, free_port(), config, rows)[0] for _ in range(2))
    assert first == again
    assert first[0][0]["train/loss"] != first[0][1]["train/loss"]


def passes(rank: int, world_size: int, port: int, config: Config, folder: Path) -> list[str]:
    """The fault points of a step, a save and a load, each of which is made to raise; what was done up to each."""
    trainer = open_trainer(config, rank, world_size, port)
    start = weights(trainer)
    struck = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_FAULT_DIR", str(folder))
        for place, act in (
            ("train.forward", lambda: trainer.step(ROWS, 3)),
            ("train.optimizer", lambda: trainer.step(ROWS, 3)),
            ("train.stepped", lambda: trainer.step(ROWS, 3)),
            ("save.files", lambda: trainer.save_state(folder, 3)),
            ("resume.loaded", lambda: trainer.load_state(folder, 3)),
        ):
            patch.setenv("GRPO_FAULTS", f"{place}@3/{rank}:raise")
            with pytest.raises(OSError, match="fault point"):
                act()
            struck.append(f"{place} {'still' if weights(trainer) == start else 'moved'}")
    trainer.close()
    return struck


@pytest.mark.slow
def test_fault_points_are_passed_in_their_places(model, tmp_path):
    (struck,) = run_ranks(1, passes, free_port(), settings(model, 0, "float32"), tmp_path)
    assert struck == [
        "train.forward still",
        "train.optimizer still",
        "train.stepped moved",
        "save.files moved",
        "resume.loaded moved",
    ]
    assert (tmp_path / "trainer.json").exists()


def records(*sizes: int) -> list[TensorRecord]:
    return [TensorRecord(f"p{index}", (size,), "bfloat16") for index, size in enumerate(sizes)]


def test_parameters_are_dealt_to_ranks_and_files():
    """12 bytes of state an element; a parameter above the limit has a file of its own."""
    assert plan_files(records(1, 1, 1, 1, 1), ranks=2) == {
        "p0": "optimizer-00000-000.safetensors",
        "p1": "optimizer-00001-000.safetensors",
        "p2": "optimizer-00000-000.safetensors",
        "p3": "optimizer-00001-000.safetensors",
        "p4": "optimizer-00000-000.safetensors",
    }
    parts = [name[-15:-12] for name in plan_files(records(10, 10, 30, 10, 9, 1, 1), ranks=1, limit=240).values()]
    assert parts == ["000", "000", "001", "002", "002", "002", "003"]
    assert plan_files(records(1), ranks=3) == {"p0": "optimizer-00000-000.safetensors"}
