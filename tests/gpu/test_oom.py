"""Out of memory on a real GPU, in the trainer's step and in the engine's start; `pytest tests/gpu -s` shows the words.

The trainer stands in this process behind the border of its actor; the engine runs as it does in its actor.
"""

import asyncio
import gc
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.cluster import actors
from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.border import bordered
from grpo.config import Config
from grpo.errors import GrpoError, OutOfMemory
from grpo.types import Sample
from tests.models import tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GIB = 2**30
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}


def configured(folder: Path, **sections: dict[str, object]) -> Config:
    base: dict[str, dict[str, object]] = {
        "model": {"path": str(folder), "dtype": "bfloat16", "max_length": 512},
        "run": {"dir": str(folder / "run")},
        "rollout": {"max_tokens": 64},
        "train": {"tokens_per_micro_batch": 65536},
        "cluster": {"device": "cuda"},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return Config.model_validate(base)


def leave_gib(free: float) -> torch.Tensor:
    """Takes all of the GPU's memory but that much."""
    gc.collect()
    torch.cuda.empty_cache()
    available, _ = torch.cuda.mem_get_info()
    return torch.empty(int(available - free * GIB), dtype=torch.uint8, device="cuda")


def samples(count: int, length: int) -> list[Sample]:
    ids = tuple(5 + place % 50 for place in range(length))
    return [
        Sample(f"train:{row}", 0, ids[:8], ids[8:], (-4.1,) * (length - 8), ((0, 0),), "length", "", advantage=1.0)
        for row in range(count)
    ]


def told(caught: pytest.ExceptionInfo[GrpoError]) -> str:
    print(f"\n{type(caught.value).__name__}, exit code {caught.value.exit_code}: {caught.value}")
    return str(caught.value)


def test_a_step_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "node_id", lambda: "here")
    tiny_folder(tmp_path, **SHAPE)
    config = configured(tmp_path, sync={"max_mismatch": 100})
    actor: Any = bordered(PolicyModelActor, config, "trainer", 0, "cuda")(config, 0, "cuda")
    actor.start("127.0.0.1", free_port())
    hold = leave_gib(0.05)
    try:
        with pytest.raises(OutOfMemory) as caught:
            actor.step(samples(256, 500), 1)
    finally:
        del hold
        torch.cuda.empty_cache()
        actor.close()
    text = told(caught)
    assert text.startswith("train: trainer rank 0 is out of memory on its GPU: ")
    assert (
        "Tried to allocate" in text and "total capacity" in text and "train.tokens_per_micro_batch (now 65536)" in text
    )


@pytest.mark.parametrize(
    ("rollout", "free", "words"),
    [
        ({"memory_utilization": 0.9}, 2.0, ("on startup is less than", "lower rollout.memory_utilization (now 0.9)")),
        ({"memory_utilization": 0.001}, None, ("raise rollout.memory_utilization (now 0.001)",)),
    ],
)
def test_the_start_of_an_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rollout: dict[str, object],
    free: float | None,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(actors, "node_id", lambda: "here")
    tiny_folder(tmp_path, **SHAPE)
    config = configured(tmp_path, rollout=rollout | {"enforce_eager": True, "max_tokens": 64})
    actor: Any = bordered(VLLMActor, config, "rollout", 0, "cuda")(config, 0, "cuda")
    hold = leave_gib(free) if free else None
    try:
        with pytest.raises(OutOfMemory) as caught:
            asyncio.run(actor.start())
    finally:
        del hold
        torch.cuda.empty_cache()
    text = told(caught)
    assert text.startswith("start: engine 0 is out of memory")
    assert all(word in text for word in words) and "Traceback" in caught.value.traceback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
