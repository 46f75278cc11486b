"""Small actors for real Ray: a worker whose verbs succeed, fail, hang and die."""

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from grpo.cluster.handles import RayWorker
from grpo.cluster.session import Session
from grpo.config import Config
from grpo.errors import DataError
from grpo.interfaces import Call, Place

SECONDS = 30


def make_config(run_dir: Path, **sections: object) -> Config:
    base = {
        "model": {"path": "unused"},
        "run": {"dir": str(run_dir)},
        "rollout": {"engines": 2},
        "train": {"ranks": 24},  # room for every actor below
        "deadlines": {"health": 4, "rollout": 20},
    }
    return Config.model_validate(base | sections)


class Unloadable:
    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


class Actor:
    """Verbs that succeed, fail, hang and die."""

    def __init__(self, config: object = None, index: int = 0, device: str = "cpu") -> None:
        self.index = index

    def start(self) -> Place:
        import ray

        return Place(ray.get_runtime_context().get_node_id(), [os.getpid()])

    def ping(self, seconds: float) -> None:
        pass

    def number(self, value: int) -> int:
        return value

    def child(self) -> int:
        """A process that ignores the end of its parent, as an engine core does."""
        return psutil.Popen(["sleep", "300"], start_new_session=True).pid

    def shell(self) -> dict[str, object]:
        """What this process has of the shell's."""
        import statistics

        return {
            "environ": dict(os.environ),
            "path": list(sys.path),
            "optimize": sys.flags.optimize,
            "encoding": open(os.devnull).encoding,
            "statistics": statistics.mean([1, 3]),
        }

    def gpus(self) -> list[int]:
        """The GPUs that Ray shows it."""
        import ray

        return [int(number) for number in ray.get_gpu_ids()]

    def refuse(self) -> None:
        raise DataError("row 3: no answer")

    def fail(self) -> None:
        raise ValueError("two\nlines")

    def quit(self) -> None:
        raise SystemExit(3)

    def full(self) -> None:
        raise RuntimeError("cannot save") from OSError(errno.ENOSPC, "No space left on device", "/data/x")

    def unreadable(self) -> object:
        """A result that cannot be pickled."""
        return threading.Lock()

    def unloadable(self) -> object:
        """One that cannot be made again in the driver."""
        return Unloadable()

    def hang(self, seconds: float = 60) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(3)

    def close(self) -> None:
        pass


class Rank(RayWorker):
    """A handle of an Actor in the place of a trainer rank."""

    def ping(self, seconds: float) -> Call[object]:
        return Call(self, self._begin("ping", seconds, concurrency_group="health"))

    def start(self) -> Call[Place]:
        return Call(self, self._begin("start"))

    def number(self, value: int) -> Call[int]:
        return Call(self, self._begin("number", value))

    def child(self) -> Call[int]:
        return Call(self, self._begin("child"))

    def does(self, verb: str, *args: Any) -> Call[None]:
        """refuse, fail, quit, hang, die …"""
        return Call(self, self._begin(verb, *args))


def make(cluster: Session, index: int = 0) -> Rank:
    actor, needs = cluster.place(Actor, "trainer", 0, None, index, "cpu")
    rank = Rank(actor, "trainer", index, needs)
    cluster.workers.add(rank)
    cluster.workers.started(rank, cluster.workers.get([rank.start()], SECONDS, "start", ask=None)[0])
    return rank
