"""A second kind of engine takes part in whole rounds of the loop: one file and one line in the table of engines."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from grpo.checkpoint import Checkpoints
from grpo.cluster.fleet import Fleet
from grpo.cluster.job import ENGINES
from grpo.cluster.rollouts import FleetRollouts
from grpo.cluster.syncing import WeightSync
from grpo.cluster.trainer_group import TrainerGroup
from grpo.controller import Controller
from grpo.errors import ClusterError
from grpo.interfaces import Call, Components, Engine
from grpo.rollout.collector import InlineCollector
from grpo.rollout.drawing import Drawer
from grpo.run.stopping import StopRequest
from grpo.types import FileRecord, Manifest
from tests.cluster.http_engine import HttpEngine, Server
from tests.cluster.local import LocalRank, make_context, record
from tests.fakes import FakeFence, FakePrompts, FakeRecorder, FakeRewards, prompt


class FolderRank(LocalRank):
    """Leaves each version in a folder, by rename."""

    def __init__(self, index: int, events: list[str], folder: Path) -> None:
        super().__init__(index, events, {})
        self.folder = folder

    def offer_transfers(self, lanes: int, near: bool) -> Call[tuple[str, ...]]:
        return self.does("offer_transfer", lambda: (f"file://{self.folder}",))

    def send_weights(self, version: int) -> Call[Manifest | None]:
        def send() -> Manifest | None:
            scratch = self.folder / f"{version}.tmp"
            scratch.write_text(json.dumps(self.weights))
            scratch.rename(self.folder / f"{version}.json")
            return Manifest(version, tuple(record(name, digest) for name, digest in self.weights.items()))

        return self.does(f"send_weights {version}", send)

    def write(self, folder: str, step: int) -> Call[tuple[FileRecord, ...]]:
        return self.does(f"write {step}", lambda: ())


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


class Round:
    """The real loop, collector, fleet, waits and syncs around engines from the table and ranks of this process."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        monkeypatch.setitem(ENGINES, "http", lambda _cluster, _config, index: HttpEngine(server.url, index))
        self.events: list[str] = []
        folder = run_dir / "weights"
        folder.mkdir()
        rollout = {"engines": 1, "prompts_per_step": 3, "samples_per_prompt": 2}
        context = make_context(run_dir, self.events, run={"dir": str(run_dir), "steps": 3}, rollout=rollout)
        config, recorder, stop = context.config, FakeRecorder(self.events), StopRequest(30)
        create: partial[Engine] = partial(ENGINES["http"], None, config)  # type: ignore[arg-type]
        self.fleet = Fleet(context, create)
        self.trainer = TrainerGroup(context, lambda index: FolderRank(index, self.events, folder))
        self.weights = WeightSync(context, self.fleet, self.trainer, self_test_prompt=[1, 2])
        rollouts = FleetRollouts(context, self.fleet, self.weights.ensure)
        rewards = FakeRewards(self.events)
        drawer = Drawer(config, FakePrompts(), rollouts, rewards)
        collector = InlineCollector(drawer, self.weights, recorder, stop, [prompt(1000)])
        checkpoints = Checkpoints(config, run_dir, FakeFence())
        self.controller = Controller(
            config, Components(collector, self.trainer, self.weights, checkpoints, recorder, stop)
        )


def test_whole_rounds_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    job = Round(tmp_path, monkeypatch, server)
    job.controller.run(None)
    loop = [event for event in job.events if event.startswith(("log_step", "eval", "rollout has"))]
    assert loop == [
        *("rollout has 0", "eval 0"),
        *(f"{what} {step}" for step in (1, 2, 3) for what in ("rollout has", "log_step")),
        "eval 3",
    ]
    assert server.version == 3 and server.weights == {"embed": "3", "head": "3"}
    assert job.controller.committed == 3
    weights = ("load", "commit")
    assert [request for request in server.requests if request in (*weights, "generate")] == [
        *(weights * 3),  # the self-test's two, and version 0
        "generate",  # the evaluation before the first step
        *(("generate", *weights) * 3),
        "generate",
    ]


def test_a_server_that_is_gone_is_a_lost_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    job = Round(tmp_path, monkeypatch, server)
    job.weights.publish(0)
    server.stop()
    with pytest.raises(ClusterError, match="engine 0 at http://127.0.0.1:.* does not answer: .* replaced 3 times"):
        job.weights.publish(1)
