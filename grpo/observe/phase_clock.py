"""How long the run has been in each phase, up to the moment of a scrape: what was not yet over counts too."""

import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from grpo.observe.metrics import PHASES, Metric

BETWEEN = "between"
"""The phase of the time between two phases."""


class PhaseClock(Collector):
    """Seconds by phase as a counter. They add up to the time since the start, so that shares add up to 1.

    A phase inside of another takes the time of the other. Any thread may ask.
    """

    def __init__(self, metric: Metric, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metric, self._run, self._clock = metric, run, clock
        self._guard = threading.Lock()
        self._seconds = dict.fromkeys((*PHASES, BETWEEN), 0.0)
        self._open: list[str] = []
        self._since = clock()

    def began(self, phase: str) -> None:
        """From now on the time is this phase's."""
        with self._guard:
            self._turn()
            self._open.append(phase)

    def ended(self, phase: str) -> None:
        """From now on the time is that of the phase around it, or of none."""
        with self._guard:
            self._turn()
            if phase in self._open:
                self._open.remove(phase)

    def _turn(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1] if self._open else BETWEEN] += now - self._since
        self._since = now

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What a scrape gets."""
        with self._guard:
            self._turn()
            seconds = dict(self._seconds)
        family = CounterMetricFamily(self._metric.name, self._metric.help, labels=("run", *self._metric.labels))
        for phase, value in seconds.items():
            family.add_metric((self._run, phase), value)
        yield family
