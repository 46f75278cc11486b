"""Whether the loop gets on and whether it is ready: what Kubernetes asks before it restarts or trusts a pod."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from grpo.config import Config


@dataclass(frozen=True)
class Sign:
    """The last sign of progress: in which phase ("" is none), when, and how the wall clock stood."""

    phase: str
    at: float
    clock: float


class Health:
    """Told by the threads of the loop, asked by the server's. `now` are seconds of a clock that nobody sets."""

    def __init__(self, config: Config, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits(config)
        self._now = now
        self._sign = Sign("", now(), time.time())
        self._ready = False
        self._guard = threading.Lock()

    def alive(self, phase: str | None = None) -> None:
        """A sign of progress; `phase` names the one that has begun, "" for none, None for the same as before."""
        with self._guard:
            self._sign = Sign(self._sign.phase if phase is None else phase, self._now(), time.time())

    def ready(self) -> None:
        """Engines and ranks are there, and a weight sync between them is verified."""
        self._ready = True

    def health(self) -> tuple[bool, str]:
        """Whether the loop gets on within its deadlines, and a line that says so."""
        sign = self._sign
        seconds, (limit, keys) = self._now() - sign.at, self._limits[sign.phase]
        since = datetime.fromtimestamp(sign.clock, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        phase = sign.phase or "between phases"
        if seconds <= limit:
            return True, f"{phase}: last progress {seconds:.0f} s ago, at {since}; the limit is {limit:g} s"
        return False, f"{phase}: no progress for {seconds:.0f} s, since {since}; the limit is {limit:g} s ({keys})"

    def readiness(self) -> tuple[bool, str]:
        """Whether the run has come so far that it makes steps, and a line that says so."""
        if self._ready:
            return True, "ready"
        phase = self._sign.phase or "starting"
        return False, f"{phase}: engines and ranks must be ready and the first weight sync verified"


def limits(config: Config) -> dict[str, tuple[float, str]]:
    """The longest silence of each phase, in seconds, and the keys that it follows from.

    A phase may use up its deadline; then whoever was late has to be found lost and is started again, and that is the
    next sign. Between phases a start or a rebuilt trainer reads its checkpoint.
    """
    phases = {
        "": ("save",),
        "rollout": ("rollout",),
        "reward": ("reward",),
        "advantage": (),
        "train": ("train",),
        "weight_sync": ("sync",),
        "checkpoint": ("save",),
        "eval": ("rollout", "reward"),
    }
    return {phase: _limit(config, (*keys, "start", "health")) for phase, keys in phases.items()}


def _limit(config: Config, keys: tuple[str, ...]) -> tuple[float, str]:
    seconds = dict(config.deadlines)
    return sum(seconds[key] for key in keys), f"deadlines.{' + '.join(keys)}"
