"""What training waits for a commit, against the time until that is durable: one rank on this machine's CPU.

    python -m benchmarks.commit [float32|bfloat16]

A random llama of 110 M parameters with its optimizer's state; the trainer, the committer and the checkpoints are the
product's, and steps are made while each commit is written. On two cores those steps are slower for that time.
"""

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from grpo.checkpoint import Checkpoints, Committer, Content
from grpo.config import Config
from grpo.run.stopping import StopRequest
from grpo.store import open_store
from grpo.types import FileRecord
from tests.fakes import FakeFence
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "initializer_range": 0.02,
}
COMMITS, ALONE = 4, 3


def main(dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), dtype)


def measure(root: Path, dtype: str) -> None:
    from grpo.trainer import PolicyTrainer

    sections = {
        "model": {"path": str(tiny_folder(root / "model", **SIZES)), "dtype": dtype, "max_length": 24},
        "rollout": {"max_tokens": 16},
        "train": {"learning_rate": 1e-6, "tokens_per_micro_batch": 256},
        "sync": {"max_mismatch": 100},  # random rows fit no weights
        "run": {"dir": str(root)},
    }
    config = Config.model_validate(sections)
    trainer = PolicyTrainer(config, 0, 1, 0, "cpu", "127.0.0.1", free_port(), total_steps=1000, threads=2)
    trainer.try_saving(root / "trial")
    committer = Committer(Checkpoints(config, root, FakeFence()), StopRequest(30), seconds=600)
    rows, step = random_samples(32), 0

    def make_step() -> float:
        nonlocal step
        step, began = step + 1, time.perf_counter()
        trainer.step(rows, step)
        return time.perf_counter() - began

    make_step()
    print(f"a step alone: {statistics.median(make_step() for _ in range(ALONE)):.2f} s")
    for _ in range(COMMITS):
        began = time.monotonic()
        trainer.snapshot(step)
        committer.begin(step, began, partial(write, trainer), lambda: Content({}, None, {}))
        beside = []
        while committer.busy:
            beside.append(make_step())
        made = committer.take()
        assert made, "it has ended"
        size = sum(file.size for file in made.commit.files) / 2**20
        print(
            f"{size:.0f} MiB: stall {made.stall_seconds:.3f} s, durable after {made.seconds:.2f} s, "
            f"{made.stall_seconds / made.seconds:.1%}; a step beside it: {statistics.median(beside):.2f} s"
        )
    trainer.close()


def write(trainer: Any, folder: str, step: int) -> tuple[FileRecord, ...]:
    """As a rank's actor does."""
    store = open_store(folder)
    with store.workspace("") as local:
        trainer.write(local, step)
        return store.publish(local, "")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["float32"]))
