"""What leaves an actor: errors of ours alone, whatever was raised inside, also from an actor that Ray holds."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from grpo.cluster.border import bordered
from grpo.cluster.session import Session
from grpo.config import Config
from grpo.errors import BugError, DataError, DiskError, GrpoError, OutOfMemory
from tests.cluster.actors import SECONDS, Rank

CONFIG = Config.model_validate({"model": {"path": "/model"}, "run": {"dir": "/run"}})


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:  # args do not make it again
        super().__init__("two")
        self.lock = (value for value in ())


class Actor:
    def step(self, error: BaseException) -> None:
        raise error

    async def generate(self, error: BaseException) -> None:
        raise error

    async def answer(self) -> int:
        return 7

    def deep(self, depth: int = 0) -> int:
        return self.deep(depth + 1)


def inside() -> Any:
    return bordered(Actor, CONFIG, "trainer", 2, "cpu")()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), BugError),
        (MemoryError(), OutOfMemory),
        (OSError(errno.ENOSPC, "full"), DiskError),
        (Unpicklable(1, 2), BugError),
        (SystemExit(3), BugError),
        (ExceptionGroup("both", [ValueError("a"), OSError(errno.ENOSPC, "full")]), DiskError),
    ],
)
def test_a_librarys_error_becomes_one_of_ours_that_can_travel(error: BaseException, kind: type[GrpoError]) -> None:
    actor = inside()
    for run in (lambda: actor.step(error), lambda: asyncio.run(actor.generate(error))):
        with pytest.raises(GrpoError) as caught:
            run()
        assert type(caught.value) is kind and "Traceback" in caught.value.traceback
        again = cloudpickle.loads(cloudpickle.dumps(caught.value))
        assert (str(again), again.traceback, again.fatal) == (str(caught.value), caught.value.traceback, True)
        assert Path(caught.value.traceback_file).parent == Path("/run/errors")


@pytest.mark.parametrize("error", [DataError("row 3"), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_is_ours_or_a_request_to_stop_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        inside().step(error)
    assert caught.value is error and error.__cause__ is None


def test_a_process_that_ray_ends_is_not_held_up() -> None:
    ended = SystemExit(1)
    ended.ray_terminate_msg = "The process receives a SIGTERM."  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        inside().step(ended)


def test_an_endless_recursion_is_a_bug() -> None:
    with pytest.raises(BugError, match="^weight sync: trainer rank 2 failed by a bug .*recursion"):
        inside().deep()


def test_results_and_names_stay() -> None:
    actor = inside()
    assert asyncio.run(actor.answer()) == 7
    assert type(actor).__name__ == "Actor" and asyncio.iscoroutinefunction(actor.generate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "kind", "words"),
    [
        ("fail", BugError, "ValueError: two lines"),
        ("quit", BugError, "SystemExit: 3"),
        ("full", DiskError, "No space left on device: '/data/x'"),
        ("unreadable", BugError, "pickle"),
        ("unloadable", BugError, "no number"),
    ],
)
def test_ray_brings_it_to_the_driver_and_the_rank_lives(
    cluster: Session, rank: Rank, verb: str, kind: type[GrpoError], words: str
) -> None:
    with pytest.raises(GrpoError) as caught:
        cluster.workers.get([rank.does(verb)], SECONDS, "train")
    assert type(caught.value) is kind and words in str(caught.value)
    assert str(caught.value).startswith("train: trainer rank 0 ") or verb in ("fail", "quit", "full")
    trace = Path(caught.value.traceback_file).read_text()
    assert words in " ".join(trace.split()) and "\x1b" not in trace
    assert not rank.lost and cluster.workers.get([rank.number(5)], SECONDS, "train") == [5]
