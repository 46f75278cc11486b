"""The workers of one run: who they are, where they run, waits for them, and the end of lost ones."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path

from ray.exceptions import RayError

from grpo.cluster.head import Head
from grpo.cluster.waiting import Waiting
from grpo.config import Config
from grpo.errors import GrpoError
from grpo.interfaces import Call, Place, Worker
from grpo.run.faults import publish_pids
from grpo.run.start import with_place
from grpo.run.stopping import StopRequest
from grpo.types import Stats

GRACE_SECONDS = 10.0  # for a worker to end by itself before it is killed


class Workers(Waiting):
    """All workers that were ever there. It waits for their calls, and ends those that it loses meanwhile."""

    def __init__(self, config: Config, stop: StopRequest, head: Head, say: Callable[[str], None] = print) -> None:
        super().__init__(config, stop, head, self.discard)
        self.say = say
        self._all: list[Worker] = []
        self._asked: dict[Worker, float] = {}
        self._answered: dict[Worker, float] = {}
        self._guard = threading.Lock()

    def add(self, worker: Worker) -> None:
        """From now on it is one of them."""
        self._all.append(worker)
        self._asked[worker] = time.monotonic()

    def starts(self, call: Call[Place]) -> Call[Place]:
        """Notes when the answer comes: whoever waits for it may look later."""
        call.future.add_done_callback(lambda _: self._answered.update({call.worker: time.monotonic()}))
        return call

    def started(self, worker: Worker, place: Place) -> dict[str, Stats]:
        """Remembers the node and the processes that a worker tells once it has started.

        What its start took, by its name; nothing of one that does not say.
        """
        worker.node_id, worker.pids = place.node_id, place.pids
        self.oom_kills[place.node_id] = max(place.oom_kills, self.oom_kills.get(place.node_id, 0))
        for note in place.notes:
            self.say(note)
        if worker.role == "trainer":
            publish_pids("trainer_rank", [other.pids[0] for other in self.alive("trainer")])
        else:
            publish_pids("rollout_actor", [other.pids[0] for other in self.alive("rollout")])
            publish_pids("engine_core", [pid for other in self.alive("rollout") for pid in other.pids[1:2]])
        # A future wakes who waits for it before it calls back.
        asked, answered = self._asked.pop(worker, 0.0), self._answered.pop(worker, time.monotonic())
        return {str(worker): with_place(place.seconds, answered - asked)} if place.seconds and asked else {}

    @property
    def lost_any(self) -> bool:
        """Whether any was ever lost."""
        return any(worker.lost for worker in self._all)

    @property
    def headless(self) -> bool:
        """Whether Ray's head is lost."""
        return self.head.lost

    def leaving(self, workers: Sequence[Worker]) -> list[Worker]:
        """Those whose node is about to go away."""
        return [worker for worker in workers if worker.node_id in self.head.draining]

    def alive(self, role: str) -> list[Worker]:
        """Started workers of a role that are not lost and have processes of ours."""
        return [worker for worker in self._all if worker.role == role and worker.pids and not worker.lost]

    def discard(self, worker: Worker, error: GrpoError, stacks: bool) -> None:
        """Ends a lost worker and its processes; the stacks of a frozen one are written down first."""
        with self._guard:  # several threads may notice
            if worker.lost:
                return
            told = any(other.lost is error for other in self._all)  # all ranks are lost with one
            worker.lost = error
        if not told:
            self.say(str(error))
        if worker.pids and stacks:
            self._write_stacks(worker)
        worker.end()

    def _write_stacks(self, worker: Worker) -> None:
        name = f"{worker.role}-{worker.index}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
        path = Path(self.config.run.dir, "stacks", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(worker.stacks())
        self.say(f"stacks of {worker}: {path}")

    def close(self) -> None:
        """Asks every worker to close, and ends those that do not."""
        living = [worker for worker in self._all if not worker.lost]
        with contextlib.suppress(RayError):
            there = [worker for worker in living if worker.pids or not worker.wanted_node()]
            wait([worker.close().future for worker in there], timeout=GRACE_SECONDS)
        for worker in living:
            worker.end()
        self._all = []
