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
from grpo.weights.digest import digest
from tests.models import tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_state import SAVED, open_trainer, settings, train, weights

KINDS = [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]


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
    """Each state is written at once, then from a copy in a thread while the next steps train, twice; then it spoils."""
    answers = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        places = set()
        for round, first in enumerate((1, 3)):
            now, later = root / f"{number}-{round}-now", root / f"{number}-{round}-later"
            train(trainer, first, first)
            for folder in (now, later):
                folder.mkdir(exist_ok=True)
            trainer.save_state(now, first)
            trainer.snapshot(first)
            places.add(trainer.kept.memory.all.data_ptr())
            trainer.publish(first, first)
            copied = weights(trainer)
            writing = threading.Thread(target=trainer.write, args=(later, first))
            writing.start()
            train(trainer, first + 1, first + 1)
            writing.join()
            assert weights(trainer) != copied, "the training went on"
            if rank == 0:
                with trainer.published.sending(first) as tensors:
                    assert {name: digest(tensor) for name, tensor in tensors} == copied
        torch.distributed.barrier()  # rank 0's thread may still write
        trainer.load_state(root / f"{number}-1-later", SAVED)
        answers.append((len(places), weights(trainer) == copied, spoil(trainer)))
    trainer.close()
    return answers


def spoil(trainer: Any) -> list[str]:
    """On rank 1 alone, where it can be, a piece is made NaN; what the copy of both ranks says."""
    from grpo.trainer.deepspeed import gathered

    param = trainer.weights.params["model.norm.weight"]
    found: list[str] = []
    for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
        with gathered([param], modify=True):
            view = param.data if kind == "weight" else trainer.engine.shards.of(param).views[kind]
            kept = view.clone()
            if trainer.rank == 1 or kind == "weight":
                view[-1:] = torch.nan
        with pytest.raises(NonFiniteError) as caught:
            trainer.snapshot(1)
        found.append(str(caught.value))
        with gathered([param], modify=True):
            (param.data if kind == "weight" else view).copy_(kept)
    trainer.snapshot(1)
    return found


@pytest.mark.slow
def test_what_is_written_beside_the_training_is_what_would_be_written_at_once(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", kind="qwen2")
    configs = [settings(model, *kind) for kind in KINDS]
    first, second = run_ranks(2, write_both, free_port(), configs, tmp_path)
    assert first == second
    for places, loaded, said in first:
        assert places == 1, "one piece of memory for both commits"
        assert loaded, "the state of its own step"
        assert all("model.norm.weight" in text and "only a finite model is saved" in text for text in said)
        assert "exp_avg of" in said[2] and "exp_avg_sq of" in said[3]
    for number in range(len(KINDS)):
        for round in range(2):
            now, later = (files(tmp_path / f"{number}-{round}-{when}") for when in ("now", "later"))
            assert now == later and {"trainer.json", "rng-00001.json", "policy/model.safetensors"} <= set(now)
