"""Small actors whose every verb takes a random time longer: who is first, and what overlaps what, is another each time.

The times follow from CHAOS_SLOW, the seed of a run. Signs of life are not slowed: nothing is to be taken for dead.
"""

import asyncio
import functools
import inspect
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.chaos.actors import FakeEngineActor, FakeRankActor
from tests.chaos.reward import SLOW

MOST_SECONDS = 0.5
NOT_SLOWED = ("ping", "health", "ask", "close")
SLEPT = "slept.txt"
A = TypeVar("A")


def moment(seed: str, *place: object) -> float:
    """Seconds: a few hundredths mostly, now and then half a second."""
    return MOST_SECONDS * random.Random(f"{seed}/{place}").random() ** 4


def slowed(actor: type[A]) -> type[A]:
    """The same actor; a verb begins late, and answers late."""
    for name, verb in inspect.getmembers(actor, inspect.isfunction):
        if not name.startswith("_") and name not in NOT_SLOWED:
            setattr(actor, name, _slowed(name, verb))
    return actor


def _slowed(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(verb):

        @functools.wraps(verb)
        async def late(actor: Any, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(_delay(actor, name))
            result = await verb(actor, *args, **kwargs)
            await asyncio.sleep(_delay(actor, name))
            return result

        return late

    @functools.wraps(verb)
    def late_too(actor: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(_delay(actor, name))
        result = verb(actor, *args, **kwargs)
        time.sleep(_delay(actor, name))
        return result

    return late_too


def _delay(actor: Any, name: str) -> float:
    """The next one; it is written down, so that a run which was not slowed is not mistaken for one."""
    calls = vars(actor).setdefault("slowed_calls", itertools.count())
    place = vars(actor).get("rank", vars(actor).get("index"))
    seconds = moment(os.environ[SLOW], type(actor).__name__, place, next(calls))
    with open(Path(os.environ["GRPO_FAULT_DIR"], SLEPT), "a", encoding="utf-8") as file:
        file.write(f"{seconds:.4f} {type(actor).__name__} {name}\n")
    return seconds


def slept(faults: Path) -> float:
    """Seconds by which calls of a run took longer, all together."""
    file = faults / SLEPT
    return sum(float(line.split()[0]) for line in file.read_text().splitlines()) if file.exists() else 0.0


@slowed
class SlowEngineActor(FakeEngineActor):
    """Each prompt takes its time: a switch may fall between any two."""


@slowed
class SlowRankActor(FakeRankActor):
    """Each collective takes its time too."""
