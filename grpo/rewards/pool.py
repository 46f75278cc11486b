"""The pool of workers: calls side by side, the same results in the same order whichever worker answers."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from grpo.config import Config
from grpo.errors import ConfigError, DeadlineExceeded
from grpo.rewards.process import Broken, Failure, RewardProcess
from grpo.run.faults import publish_pids
from grpo.types import Prompt, Sample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One function (its place among the user's functions) on one sample."""

    function: int
    prompt: Prompt
    sample: Sample


class Shared(Generic[T]):
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def next(self) -> T | None:
        """The next item, None at the end."""
        with self._lock:
            return next(self._items, None)


class RewardPool:
    """`reward_code.workers` processes that import the same functions. Killed ones are replaced at once."""

    def __init__(self, config: Config, functions: Sequence[str]) -> None:
        """Raises ConfigError for a function that cannot be used, DeadlineExceeded if an import takes too long."""
        self.config = config
        self.functions = tuple(functions)
        folder = config.reward_code.folder
        if folder and not Path(folder).expanduser().is_dir():
            raise ConfigError(f"reward_code.folder: must name a folder that is here, found none at {folder!r}")
        for name in config.reward_code.readable:
            if not Path(name).expanduser().exists():
                raise ConfigError(f"reward_code.readable: must name files and folders that are here, found no {name!r}")
        self._lock = threading.Lock()
        self._stopped = False
        end = time.monotonic() + config.deadlines.reward
        self.workers = [self._started() for _ in range(config.reward_code.workers)]
        try:
            for place in range(len(self.workers)):
                self._make_ready(place, end)
        except BaseException:
            self.close()
            raise

    def run(self, calls: Sequence[Call], tolerated: int) -> list[float | Failure | None]:
        """The outcome of each call, in order. After more than `tolerated` failures no further call is begun: None.

        Raises DeadlineExceeded if all together take longer than `deadlines.reward`.
        """
        end = time.monotonic() + self.config.deadlines.reward
        outcomes: list[float | Failure | None] = [None] * len(calls)
        left = Shared(enumerate(calls))
        failed = Shared(iter(range(tolerated)))
        self._stopped = False

        def serve(place: int) -> None:
            self._make_ready(place, end)
            while not self._stopped and (job := left.next()):
                outcome = outcomes[job[0]] = self._outcome(place, job[1], end)
                if isinstance(outcome, Failure) and failed.next() is None:
                    self._stopped = True

        with ThreadPoolExecutor(len(self.workers), "reward") as threads:
            serving = [threads.submit(serve, place) for place in range(len(self.workers))]
            try:
                for future in wait(serving, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stopped = True
                while wait(serving, timeout=0.1).not_done:  # what they wait for must end
                    for worker in self.workers:
                        worker.kill()
                raise
        return outcomes

    @property
    def missing(self) -> tuple[str, ...]:
        """Fences that this system does not have."""
        return self.workers[0].missing

    def close(self) -> None:
        """Ends every worker."""
        self._stopped = True
        for worker in self.workers:
            worker.close()

    def _outcome(self, place: int, call: Call, end: float) -> float | Failure:
        """One call; a second time on a new worker if something outside of the function may have ended the first."""
        outcome: float | Failure = 0.0
        for _ in range(2):
            until = min(time.monotonic() + self.config.reward_code.seconds, end)
            outcome = self.workers[place].call(
                call.function, call.prompt.question, call.sample.text, call.prompt.answer, until
            )
            if isinstance(outcome, Failure) and outcome.kind == "timeout" and time.monotonic() >= end:
                raise self._too_late()
            self._make_ready(place, end)
            if not (isinstance(outcome, Failure) and outcome.outside):
                break
        return outcome

    def _make_ready(self, place: int, end: float) -> None:
        """Replaces a worker that has ended, and waits for its imports; a second time if something ended those."""
        for attempt in range(2):
            worker = self.workers[place]
            if worker.ready:
                return
            if self._stopped and not worker.alive:
                return
            if not worker.alive:
                worker = self.workers[place] = self._started()
            try:
                error = worker.wait(end)
                if not error:
                    self._publish()
                    return
            except TimeoutError:
                worker.close()
                raise self._too_late() from None
            except Broken as broken:
                error = f"importing {', '.join(self.functions)} {broken.failure.what}; correct the module"
                if broken.failure.outside and attempt == 0:
                    worker.close()
                    continue
            worker.close()
            raise ConfigError(f"rewards: {error}")

    def _started(self) -> RewardProcess:
        return RewardProcess(self.functions, self.config.reward_code)

    def _publish(self) -> None:
        with self._lock:
            publish_pids("reward_worker", [worker.pid for worker in self.workers if worker.pid and worker.alive])

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"rewards must be done within deadlines.reward = {self.config.deadlines.reward:g} s, but "
            f"{', '.join(self.functions)} took longer and was killed; make it faster or raise deadlines.reward"
        )
