"""Where the time of a start goes: what one process is at, from its begin on, without gaps.

The driver is in one of DRIVER at a time, an actor in one of ACTOR. What an actor did adds up to the time from when the
driver asked for it to when it was ready; what the driver did, to that from the command to the first step.
"""

import time
from collections.abc import Mapping

import psutil

from grpo.types import Stats

DRIVER = ("process", "data", "ray", "actors", "save", "load", "sync", "connect", "self_test")
"""Python and imports; prompts and rewards; Ray comes up; waits for actors; ranks try to save; a checkpoint is loaded;
the first weights travel; their ways are opened; engines prove that they follow the trainer."""
ENGINE = ("imports", "core", "device", "weights", "memory", "compile", "warm_up", "graphs", "tokenizer")
RANK = ("imports", "ranks", "weights", "compile", "proof", "optimizer", "rehearsal")
ACTOR = {"rollout": ("place", "process", *ENGINE), "trainer": ("place", "process", *RANK)}
"""A node is found; Python and Ray's worker; libraries. An engine: its core process, its device, the KV cache, compiled
code, the first passes, CUDA graphs. A rank: it meets the others, proves the model, makes optimizer states, tries an
update. Both load the model's weights."""


class Phases:
    """Seconds by phase. Each phase lasts until the next begins; one that comes again counts on."""

    def __init__(self, phase: str, began: float | None = None) -> None:
        """`began`: when the first one did, in seconds of time.monotonic(); now if it is not given."""
        self._phase = phase
        self._since = time.monotonic() if began is None else began
        self._seconds: dict[str, float] = {}

    def begin(self, phase: str) -> None:
        """The phase before has ended, and this one begins."""
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def split(self, phase: str, parts: Mapping[str, float]) -> None:
        """A phase that has ended was these parts, as another process of the actor has measured, and the rest."""
        left = self._seconds.get(phase, 0.0)
        for name, seconds in parts.items():
            taken = min(seconds, left)
            self._seconds[name] = self._seconds.get(name, 0.0) + taken
            left -= taken
        self._seconds[phase] = left

    def end(self) -> Stats:
        """The last phase has ended too: seconds of all, in the order in which they began."""
        self.begin("")
        return dict(self._seconds)


def process_began() -> float:
    """When this process did, in seconds of time.monotonic()."""
    return time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())


def with_place(seconds: Stats, took: float) -> Stats:
    """What an actor did, and what lay before its process began; the driver has waited for `took` seconds in all.

    Ray keeps processes ready, which began before they were asked for.
    """
    place = took - sum(seconds.values())
    process = max(0.0, seconds.get("process", 0.0) + min(0.0, place))
    return {"place": max(0.0, place), **seconds, "process": process}
