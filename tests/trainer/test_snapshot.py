"""A state that is copied and written beside the training is the one that a training which waits would have written."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import Config
from grpo.errors import NonFiniteError
from grpo.trainer.snapshot import HostMemory, copy
from grpo.types import TensorRecord
from tests.models import tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_state import DTYPES, SAVED, open_trainer, settings, train, weights

KINDS = [(stage, dtype) for dtype in DTYPES for stage in (0, 1, 2, 3)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_host_memory_holds_every_tensor_in_its_own_place() -> None:
    records = {
        "weight/a": TensorRecord("a", (3, 5), "bfloat16"),
        "step/a": TensorRecord("a", (), "float32"),
        "weight/empty": TensorRecord("empty", (0, 4), "float32"),
        "weight/bias": TensorRecord("bias", (7,), "int64"),
    }
    memory = HostMemory(records, torch.device("cpu"))
    for number, view in enumerate(memory.views.values()):
        view.fill_(number + 1)
    assert [(tuple(view.shape), str(view.dtype)) for view in memory.views.values()] == [
        (record.shape, f"torch.{record.dtype}") for record in records.values()
    ]
    assert [view.unique().tolist() for view in memory.views.values()] == [[1], [2], [], [4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_copy_is_exact_and_tells_what_is_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.trainer.snapshot.PIECE", 4)
    source = torch.full((3, 5), -0.0)
    goal = torch.empty(3, 5)
    assert copy(goal, source) and goal.signbit().all()
    assert copy(torch.empty(5, 3), source.T) and copy(torch.empty(()), torch.tensor(1.0))
    for place in (0, 7, 14):
        spoiled = source.clone()
        spoiled.view(-1)[place] = value
        assert not copy(goal, spoiled)
        assert torch.equal(goal, spoiled) or value != value


def write_both(rank: int, world_size: int, port: int, configs: list[Config], root: Path) -> list[Any]:
    """Each state is written at once, then from a copy in a thread while the next steps train, twice."""
    answers = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        places = set()
        for round, first in enumerate((1, 3)):
            now, later = root / f"{number}-{round}-now", root / f"{number}-{round}-later"
            train(trainer, first, first + 1)
            for folder in (now, later):
                folder.mkdir(exist_ok=True)
            trainer.save_state(now, first)
            trainer.snapshot(first)
            places.add(trainer.kept.memory.all.data_ptr())
            copied = weights(trainer)
            writing = threading.Thread(target=trainer.write, args=(later, first))
            writing.start()
            train(trainer, first + 2, first + 3)
            writing.join()
            assert weights(trainer) != copied, "the training went on"
        trainer.load_state(root / f"{number}-1-later", SAVED)
        answers.append((len(places), weights(trainer) == copied))
    trainer.close()
    return answers


@pytest.mark.slow
def test_what_is_written_beside_the_training_is_what_would_be_written_at_once(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", kind="qwen2")
    configs = [settings(model, *kind) for kind in KINDS]
    answers = run_ranks(2, write_both, free_port(), configs, tmp_path)
    assert answers == [[(1, True)] * len(KINDS)] * 2, "one piece of memory for both commits, and the state of its step"
    for number in range(len(KINDS)):
        for round in range(2):
            now, later = (files(tmp_path / f"{number}-{round}-{when}") for when in ("now", "later"))
            assert now == later and {"trainer.json", "rng-00001.json", "policy/model.safetensors"} <= set(now)


def spoil(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """On rank 1 alone, where it can be, a piece is made NaN; what the copy of both ranks says."""
    from grpo.trainer.deepspeed import gathered

    answers = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        param = trainer.weights.params["model.norm.weight"]
        found: list[str] = []
        for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
            with gathered([param], modify=True):
                view = param.data if kind == "weight" else trainer.engine.shards.of(param).views[kind]
                kept = view.clone()
                if rank == 1 or kind == "weight":
                    view[-1:] = torch.nan
            with pytest.raises(NonFiniteError) as caught:
                trainer.snapshot(1)
            found.append(str(caught.value))
            with gathered([param], modify=True):
                (param.data if kind == "weight" else view).copy_(kept)
        trainer.snapshot(1)
        answers.append(found)
    trainer.close()
    return answers


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_copied_by_no_rank(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", kind="qwen2")
    kinds = [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]
    first, second = run_ranks(2, spoil, free_port(), [settings(model, *kind) for kind in kinds])
    assert first == second
    for found in first:
        assert all("model.norm.weight" in said and "only a finite model is saved" in said for said in found)
        assert [kind in said for kind, said in zip(("exp_avg of", "exp_avg_sq of"), found[2:], strict=True)] == [
            True
        ] * 2
