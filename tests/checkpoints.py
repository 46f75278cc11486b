"""Small checkpoints for tests, written the way that the controller and the ranks write them."""

import os
import sys
from pathlib import Path

from grpo.checkpoint import Checkpoints, Commit
from grpo.config import Checkpoint, Config, Model, Run
from grpo.store import open_store


class Held:
    """A lease that is never lost."""

    def __init__(self, attempt: int = 1) -> None:
        self.attempt = attempt

    def check(self) -> None:
        return


def config(run_dir: Path, **checkpoint: object) -> Config:
    return Config(run=Run(dir=str(run_dir)), model=Model(path="/model"), checkpoint=Checkpoint(**checkpoint))


def checkpoints(run_dir: Path, attempt: int = 1, **checkpoint: object) -> Checkpoints:
    return Checkpoints(config(run_dir, **checkpoint), run_dir, Held(attempt))


def files_of(step: int, rank: int) -> dict[str, bytes]:
    own = {f"optimizer-{rank:05d}.safetensors": bytes([step % 256]) * 300, f"rng-{rank:05d}.json": b"[%d]" % step}
    return own | {"policy/config.json": b"{}", "policy/model.safetensors": b"%d" % step * 100} if rank == 0 else own


def save(writer: Checkpoints, step: int, score: float | None = None, ranks: int = 2) -> Commit:
    """begin, every rank's workspace and publish, commit."""
    folder = writer.begin(step)
    records = []
    for rank in range(ranks):
        store = open_store(folder)
        with store.workspace("") as work:
            for name, data in files_of(step, rank).items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_bytes(data)
            records += store.publish(work, "")
    state = {"progress": {"step": step, "prompts": {"fingerprint": "abc"}}}
    return writer.commit(step, records, state, score, {"metrics.jsonl": b'{"step": %d}\n' % step})


def main() -> None:
    """`python -m tests.checkpoints RUN_DIR ATTEMPT STEP...`: saves, passing fault points, until it is done or dies."""
    writer = checkpoints(Path(sys.argv[1]), int(sys.argv[2]), dir=os.environ.get("CHECKPOINT_DIR"))
    for step in map(int, sys.argv[3:]):
        save(writer, step)


if __name__ == "__main__":
    main()
