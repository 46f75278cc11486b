"""The order of the loop, against fakes of all its components."""

import errno
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from grpo.checkpoint import Checkpoints, Progress
from grpo.config import Config
from grpo.controller import Controller, content
from grpo.errors import (
    CheckpointError,
    ClusterError,
    Fenced,
    GrpoError,
    Interrupted,
    InterruptedEarly,
    NoLearningSignal,
    RewardError,
    StoreLost,
    TrainerLost,
    WeightSyncError,
)
from grpo.interfaces import Components
from grpo.rollout.collector import InlineCollector
from grpo.rollout.drawing import Drawer
from grpo.run.clock import due
from grpo.run.stopping import StopRequest
from grpo.types import Group, Sampling
from tests.fakes import (
    FakeFence,
    FakePrompts,
    FakeRecorder,
    FakeRewards,
    FakeRollouts,
    FakeTrainer,
    FakeWeights,
    prompt,
)


@dataclass
class Job:
    """A controller and its fakes, which share one list of events; its checkpoints are real."""

    config: Config
    run_dir: Path
    held_out: int = 1
    lost: frozenset[int] = frozenset()
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompts = FakePrompts()
        self.weights = FakeWeights(self.events, lost=self.lost)
        self.rollouts = FakeRollouts(self.events, self.weights)
        self.rewards = FakeRewards(self.events)
        self.trainer = FakeTrainer(self.events)
        self.recorder = FakeRecorder(self.events)
        self.checkpoints = Checkpoints(self.config, self.run_dir, FakeFence())
        self.stop = StopRequest(grace_seconds=30)

    def run(self) -> list[str]:
        held_out = [prompt(1000 + number) for number in range(self.held_out)]
        drawer = Drawer(self.config, self.prompts, self.rollouts, self.rewards)
        collector = InlineCollector(drawer, self.weights, self.recorder, self.stop, held_out)
        components = Components(collector, self.trainer, self.weights, self.checkpoints, self.recorder, self.stop)
        Controller(self.config, components).run(self.checkpoints.newest())
        return self.events


def config(steps: int = 2, **sections: dict[str, object]) -> Config:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 16, "temperature": 0.9}
    return Config.model_validate({"model": {"path": "x"}, "run": {"steps": steps}, "rollout": rollout} | sections)


def test_the_order_of_a_run(tmp_path: Path) -> None:
    assert Job(config(steps=2), tmp_path).run() == [
        "rewind 0",
        "sync 0",
        *("generate 0", "score", "eval 0"),
        *("generate 1", "score", "step 1", "sync 1", "log_step 1"),
        *("generate 2", "score", "step 2", "sync 2", "log_step 2"),
        *("generate 2", "score", "eval 2"),
        "save 2",
    ]


def test_every_phase_is_recorded_inside_its_step(tmp_path: Path) -> None:
    job = Job(config(steps=1), tmp_path)
    job.run()
    inside = [f"step 1/{phase}" for phase in ("rollout", "reward", "advantage", "train", "weight_sync")]
    assert job.recorder.phases == ["weight_sync", "eval", *inside, "eval", "checkpoint"]
    assert job.recorder.open == []


def test_a_batch_has_the_rows_of_the_step_in_order_with_their_advantages(tmp_path: Path) -> None:
    job = Job(config(steps=2), tmp_path)
    job.run()
    first, second = job.trainer.batches
    assert [(row.prompt_id, row.index) for row in first] == [(f"fake:{p}", g) for p in range(3) for g in range(2)]
    assert [row.prompt_id for row in second[::2]] == ["fake:3", "fake:4", "fake:5"]
    assert [row.reward for row in first] == [1.0, 0.0] * 3
    # rewards 1 and 0: mean 0.5, standard deviation sqrt(0.5) with n - 1
    assert [row.advantage for row in first] == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)] * 3)
    assert job.prompts.taken == 6


def test_training_and_evaluation_sample_differently(tmp_path: Path) -> None:
    job = Job(config(steps=1, eval={"samples_per_prompt": 4, "temperature": 0.0}), tmp_path)
    job.run()
    training, evaluation = Sampling(2, 16, 0.9, 1.0), Sampling(4, 16, 0.0, 1.0)
    assert job.rollouts.samplings == [evaluation, training, evaluation]


def test_the_recorder_gets_the_statistics_of_update_and_sync(tmp_path: Path) -> None:
    job = Job(config(steps=2, eval={"samples_per_prompt": 2}), tmp_path)
    job.run()
    assert job.recorder.steps == {step: {"loss": float(step), "rollout/effective_groups": 1.0} for step in (1, 2)}
    assert job.recorder.syncs == [*({"sync_version": float(version)} for version in range(3))]
    assert list(job.recorder.scores) == [0, 2] and job.recorder.scores[0]["eval/accuracy"] == 0.5


def test_without_held_out_prompts_nothing_is_evaluated(tmp_path: Path) -> None:
    events = Job(config(steps=1), tmp_path, held_out=0).run()
    assert events == ["rewind 0", "sync 0", "generate 1", "score", "step 1", "sync 1", "log_step 1", "save 1"]


def test_a_sync_every_second_step_leaves_samples_one_version_behind(tmp_path: Path) -> None:
    job = Job(config(steps=5, sync={"every": 2}), tmp_path, held_out=0)
    events = job.run()
    assert [event for event in events if event.startswith("sync")] == ["sync 0", "sync 2", "sync 4"]
    assert job.rollouts.versions == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)]
    assert [{row.oldest_version for row in batch} for batch in job.trainer.batches] == [{0}, {0}, {2}, {2}, {4}]


def test_an_evaluation_sees_the_newest_policy(tmp_path: Path) -> None:
    job = Job(config(steps=3, sync={"every": 2}, eval={"every": 1}), tmp_path)
    job.run()
    evaluated = [(step, version) for step, version in job.rollouts.versions if step == version]
    assert evaluated == [(0, 0), (1, 1), (2, 2), (3, 3)]
    # the training steps then start from what the evaluation has synced
    assert [(step, version) for step, version in job.rollouts.versions if step != version] == [(1, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"),
    [(0, [0, 5], [5]), (2, [0, 2, 4, 5], [2, 4, 5]), (5, [0, 5], [5]), (9, [0, 5], [5])],
)
def test_how_often_is_evaluated_and_saved(tmp_path: Path, every: int, evaluated: list[int], saved: list[int]) -> None:
    events = Job(config(steps=5, eval={"every": every}, checkpoint={"every": every}), tmp_path).run()
    assert [event for event in events if event.startswith("eval")] == [f"eval {step}" for step in evaluated]
    assert [event for event in events if event.startswith("save")] == [f"save {step}" for step in saved]


def test_a_sample_of_another_version_stops_the_run_before_it_is_trained_on(tmp_path: Path) -> None:
    job = Job(config(steps=3), tmp_path, lost=frozenset({1}))
    with pytest.raises(
        WeightSyncError, match="from weight version 1, but sample 0 of prompt fake:3 says 0; the engine missed"
    ):
        job.run()
    assert job.events[-2:] == ["log_step 1", "generate 2"]
    assert len(job.trainer.batches) == 1


def test_an_engine_that_never_got_the_first_weights_is_noticed(tmp_path: Path) -> None:
    job = Job(config(steps=1), tmp_path, held_out=0, lost=frozenset({0}))
    with pytest.raises(WeightSyncError, match="weight version 0, but .* says -1"):
        job.run()


def test_an_error_ends_the_run_where_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_groups: object) -> None:
        raise RewardError("m:f returned None")

    job = Job(config(steps=3), tmp_path, held_out=0)
    monkeypatch.setattr(job.rewards, "score", fails)
    with pytest.raises(RewardError):
        job.run()
    assert job.events == ["rewind 0", "sync 0", "generate 1"]
    assert job.recorder.open == []


@pytest.mark.parametrize(
    ("step", "every", "expected"), [(1, 0, False), (0, 1, True), (3, 3, True), (4, 3, False), (6, 3, True)]
)
def test_due(step: int, every: int, expected: bool) -> None:
    assert due(step, every) is expected


def again(job: Job, **changes: object) -> Job:
    """The next start of the same run, in a new process."""
    return Job(replace_steps(job.config, **changes), job.run_dir, held_out=job.held_out)


def replace_steps(config: Config, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def trained(job: Job) -> list[list[str]]:
    return [[row.prompt_id for row in batch[::2]] for batch in job.trainer.batches]


def test_a_start_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "whole", held_out=0)
    whole.run()
    first = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "killed", held_out=0)
    first.trainer.lost_at, first.trainer.rebuilds = ["step 4"], 0
    with pytest.raises(ClusterError, match="lost too often"):
        first.run()
    second = again(first)
    assert second.run()[:4] == ["load 2", "rewind 2", "sync 2", "generate 3"]
    assert trained(first)[:2] + trained(second) == trained(whole)
    assert second.recorder.steps == whole.recorder.steps
    assert second.trainer.updates == 5


def test_every_commit_is_reported_with_the_size_of_its_files(tmp_path: Path) -> None:
    job = Job(config(steps=3, checkpoint={"every": 2}), tmp_path)
    job.run()
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints/step_000003").iterdir()]
    manifest = (tmp_path / "checkpoints/step_000003/manifest.json").stat().st_size
    assert [step for step, _ in job.recorder.commits] == [2, 3]
    assert job.recorder.commits[-1][1] == sum(sizes) - manifest > 0


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    job = Job(config(steps=2), tmp_path)
    job.run()
    assert again(job).run() == ["load 2", "rewind 2", "sync 2"]


def test_the_evaluation_before_the_first_step_is_not_made_twice(tmp_path: Path) -> None:
    job = Job(config(steps=2, checkpoint={"every": 1}), tmp_path)
    job.run()
    assert again(job, steps=3).run().count("eval 3") == 1
    assert [event for event in job.events if event.startswith("eval")] == ["eval 0", "eval 2"]


@pytest.mark.parametrize(
    ("places", "back"),
    [
        (["step 1"], ["rewind 0"]),
        (["step 3"], ["load 2"]),
        (["save 2"], ["rewind 0"]),
        (["save 4"], ["load 2"]),
        (["step 3", "load 2"], ["load 2", "rebuild", "load 2"]),
        (["write 2"], ["rewind 0"]),
        (["write 4"], ["load 2"]),
        (["write 5"], ["load 4"]),
        (["write 4", "load 2"], ["load 2", "rebuild", "load 2"]),
    ],
)
def test_a_lost_trainer_is_rebuilt_from_the_last_checkpoint_and_the_run_is_the_same(
    tmp_path: Path, places: list[str], back: list[str]
) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "whole")
    whole.run()
    job = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "lost")
    job.trainer.lost_at = list(places)
    events = job.run()
    assert events[events.index("rebuild") + 1 :][: len(back)] == back
    assert job.recorder.steps == whole.recorder.steps
    assert job.trainer.updates == whole.trainer.updates == 5
    assert job.prompts.taken == whole.prompts.taken
    assert events.count("rebuild") == len(places) and "recovered trainer" in events
    assert job.recorder.open == []


def test_ranks_on_a_node_that_drains_are_committed_and_move_without_losing_a_step(tmp_path: Path) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 4}), tmp_path / "whole")
    whole.run()
    job = Job(config(steps=5, checkpoint={"every": 4}), tmp_path / "drained")
    job.trainer.drained_at = [2]
    events = job.run()
    moved = ["save 2", "leave", "rebuild", "load 2", "rewind 2", "sync 2"]
    assert events[events.index("log_step 2") + 1 :][: len(moved)] == moved
    assert [event for event in events if event.startswith("step")] == [f"step {step}" for step in range(1, 6)]
    assert job.recorder.steps == whole.recorder.steps and job.prompts.taken == whole.prompts.taken
    assert "recovered trainer" in events


def test_a_node_that_drains_during_the_rollout_may_be_gone_before_the_end_of_the_step(tmp_path: Path) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 4}), tmp_path / "whole")
    whole.run()
    job = Job(config(steps=5, checkpoint={"every": 4}), tmp_path / "drained")
    generate = job.rollouts.generate

    def draining(*args: object) -> object:
        job.trainer.leaving |= args[2] == 3
        return generate(*args)

    job.rollouts.generate = draining  # type: ignore[assignment, method-assign]
    job.trainer.lost_at = ["step 3"]
    events = job.run()
    assert events[events.index("generate 3") + 1] == "save 2", "before the step that the node may not outlive"
    assert events[events.index("rebuild") + 1] == "load 2"
    assert job.recorder.steps == whole.recorder.steps and job.prompts.taken == whole.prompts.taken


def test_nothing_moves_after_the_last_step(tmp_path: Path) -> None:
    job = Job(config(steps=2), tmp_path)
    job.trainer.drained_at = [2]
    assert job.run()[-1] == "save 2"


def interrupt(job: Job, part: object, verb: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM arrives during the n-th call of a verb; training is waited for, the others break off."""
    original, calls = getattr(part, verb), []

    def interrupted(*args: object, **options: object) -> object:
        result = original(*args, **options)
        calls.append(verb)
        if len(calls) == call:
            job.stop._request(signal.SIGTERM, None)
            job.stop.check(finish_first=verb == "step")
        return result

    monkeypatch.setattr(part, verb, interrupted)


@pytest.mark.parametrize(
    ("part", "verb", "committed"), [("rollouts", "generate", 3), ("rewards", "score", 3), ("trainer", "step", 4)]
)
def test_a_stop_commits_the_last_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, verb: str, committed: int
) -> None:
    whole = Job(config(steps=6, checkpoint={"every": 2}), tmp_path / "whole", held_out=0)
    whole.run()
    job = Job(config(steps=6, checkpoint={"every": 2}), tmp_path / "stopped", held_out=0)
    interrupt(job, getattr(job, part), verb, 4, monkeypatch)
    with pytest.raises(Interrupted, match=f"^stopped by SIGTERM; step {committed} is safe"):
        job.run()
    assert job.events[-1] == f"save {committed}"
    second = again(job)
    second.run()
    assert trained(job)[:committed] + trained(second) == trained(whole), "no prompt twice, none left out"


def test_a_stop_without_the_time_to_commit_says_so_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(config(steps=6, checkpoint={"every": 2, "background": False}), tmp_path, held_out=0)
    job.stop.grace_seconds = 0
    interrupt(job, job.rollouts, "generate", 4, monkeypatch)
    with pytest.raises(InterruptedEarly, match="left no time to commit step 3, .* resumes from step 2"):
        job.run()
    assert job.events[-1] == "generate 4"
    assert again(job).run()[0] == "load 2"


def test_a_stop_before_the_first_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(config(steps=6), tmp_path, held_out=0)
    interrupt(job, job.rollouts, "generate", 1, monkeypatch)
    with pytest.raises(Interrupted, match="step 0 is safe"):
        job.run()


def test_too_many_steps_without_a_signal_end_the_run(tmp_path: Path) -> None:
    job = Job(config(steps=9, run={"steps": 9, "max_steps_without_signal": 2}), tmp_path, held_out=0)
    job.rewards.right = "#### 3"
    with pytest.raises(NoLearningSignal, match=r"in each of the last 3 steps every group had equal rewards .*\[0.0\]"):
        job.run()
    assert len(job.trainer.batches) == 2


def test_the_state_of_the_first_release_is_read() -> None:
    state = {"prompts": {"epoch": 0}, "step": 7, "silent": 2, "evaluated": 5, "score": 0.5}
    assert Progress.from_state(state) == Progress({"epoch": 0}, 7, zero_variance_steps=2, evaluated=5, score=0.5)
    assert Progress.from_state(asdict(Progress({}, 3, 1))) == Progress({}, 3, 1)


def test_the_count_of_steps_without_signal_survives_a_restart(tmp_path: Path) -> None:
    sections = {"run": {"steps": 2, "max_steps_without_signal": 2}, "checkpoint": {"every": 1}}
    job = Job(config(**sections), tmp_path, held_out=0)
    job.rewards.right = "#### 3"
    job.run()
    second = again(job, steps=5)
    second.rewards.right = "#### 3"
    with pytest.raises(NoLearningSignal):
        second.run()
    assert second.trainer.batches == []


def test_a_lost_trainer_inside_recovery_is_no_endless_loop(tmp_path: Path) -> None:
    job = Job(config(steps=3), tmp_path, held_out=0)
    job.trainer.lost_at = ["step 1"] * 9
    with pytest.raises(ClusterError, match="lost too often") as caught:
        job.run()
    assert not isinstance(caught.value, TrainerLost)


SECONDS = 30.0


def wait_until(holds: Callable[[], object]) -> None:
    """In the committer's thread: for what the loop does meanwhile."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdecimal())


def test_steps_are_made_while_a_commit_is_written_and_it_holds_its_own_step(tmp_path: Path) -> None:
    job = Job(config(steps=4, checkpoint={"every": 2, "keep": 5}), tmp_path, held_out=0)
    before: dict[int, int] = {}

    def writing(step: int) -> None:
        if step == 2:
            wait_until(lambda: job.trainer.updates > 2)
        before[step] = job.trainer.updates

    job.trainer.writing = writing
    job.run()
    assert before[2] > 2 and before[4] == 4, "the trainer was further already"
    store = tmp_path / "checkpoints"
    assert [(store / name / "trainer.json").read_text() for name in steps_of(tmp_path)] == ["2", "4"]
    state = json.loads((store / "step_000002/state.json").read_text())["progress"]
    assert (state["step"], state["prompts"]) == (2, {"taken": 6})
    assert json.loads((store / "step_000002/steps.json").read_text()).keys() == {"1", "2"}
    assert [step for step, _ in job.recorder.commits] == [2, 4] and job.trainer.safe == 2
    stalls = [stats["checkpoint/stall_seconds"] for stats in job.recorder.measured]
    durable = [stats["checkpoint/durable_seconds"] for stats in job.recorder.measured]
    assert min(stalls + durable) > 0


def test_a_commit_that_is_due_waits_for_the_one_under_way(tmp_path: Path) -> None:
    job = Job(config(steps=4, checkpoint={"every": 1, "keep": 9}), tmp_path, held_out=0)
    under_way: list[int] = []

    def writing(step: int) -> None:
        under_way.append(step)
        wait_until(lambda: f"log_step {min(step + 1, 4)}" in job.events)
        assert under_way.pop() == step and not under_way

    job.trainer.writing = writing
    events = job.run()
    assert steps_of(tmp_path) == [f"step_{step:06}" for step in range(1, 5)]
    for step in range(1, 4):
        assert events.index(f"step {step + 1}") < events.index(f"save {step + 1}")


def test_without_background_no_step_is_made_before_the_commit_is_durable(tmp_path: Path) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "whole")
    whole.run()
    job = Job(config(steps=5, checkpoint={"every": 2, "background": False}), tmp_path / "waits")
    seen: list[str] = []
    job.trainer.writing = lambda step: seen.append(job.events[-1])
    assert job.run() == whole.events
    assert seen == ["save 2", "save 4", "save 5"]
    assert all(stats["checkpoint/stall_seconds"] > 0 for stats in job.recorder.measured)


def test_a_stop_waits_for_the_commit_under_way_and_makes_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(config(steps=6, checkpoint={"every": 2, "keep": 9}), tmp_path, held_out=0)
    job.trainer.writing = lambda step: wait_until(lambda: step != 2 or job.stop.requested)
    interrupt(job, job.rollouts, "generate", 4, monkeypatch)
    with pytest.raises(Interrupted, match="^stopped by SIGTERM; step 3 is safe"):
        job.run()
    assert steps_of(tmp_path) == ["step_000002", "step_000003"]


def test_a_stop_that_leaves_no_time_for_the_commit_under_way_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(config(steps=6, checkpoint={"every": 2, "keep": 9}), tmp_path, held_out=0)
    job.stop.grace_seconds = 0.5
    over = threading.Event()
    job.trainer.writing = lambda step: wait_until(lambda: step != 4 or over.is_set())
    interrupt(job, job.rollouts, "generate", 6, monkeypatch)
    with pytest.raises(InterruptedEarly, match="left no time to commit step 5, .* resumes from step 2"):
        job.run()
    over.set()
    time.sleep(0.1)
    assert steps_of(tmp_path) == ["step_000002"], "what was given up never becomes a checkpoint"
    assert again(job).run()[0] == "load 2"


@pytest.mark.parametrize("error", [Fenced("attempt 2 holds the run"), CheckpointError("no space"), StoreLost("gone")])
def test_what_a_commit_fails_with_in_the_background_ends_the_run_at_the_next_step(
    tmp_path: Path, error: GrpoError
) -> None:
    job = Job(config(steps=9, checkpoint={"every": 2}), tmp_path, held_out=0)

    def writing(step: int) -> None:
        if step == 4:
            wait_until(lambda: "step 5" in job.events)
            raise error

    job.trainer.writing = writing
    with pytest.raises(type(error)) as caught:
        job.run()
    assert caught.value is error
    assert "step 7" not in job.events and steps_of(tmp_path) == ["step_000002"]
    assert job.recorder.open == []


def test_a_disk_that_fills_up_in_the_background_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(config(steps=9, checkpoint={"every": 2}), tmp_path, held_out=0)

    def full(path: Path, data: bytes, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job.trainer.writing = lambda step: monkeypatch.setattr("grpo.store.volume._write_flushed", full)
    with pytest.raises(CheckpointError, match="No space left on device; .* bytes are free"):
        job.run()
    assert steps_of(tmp_path) == []


def test_a_lease_that_is_lost_during_the_writing_makes_no_checkpoint(tmp_path: Path) -> None:
    job = Job(config(steps=9, checkpoint={"every": 2}), tmp_path, held_out=0)

    class Gone(FakeFence):
        def check(self) -> None:
            raise Fenced("attempt 2 holds the run")

    job.trainer.writing = lambda step: setattr(job.checkpoints, "lease", Gone())
    with pytest.raises(Fenced):
        job.run()
    assert steps_of(tmp_path) == []


def test_a_start_that_was_overtaken_while_it_slept_leaves_the_folder_to_the_newer_one(tmp_path: Path) -> None:
    """It wakes up and finds its trainer too late: the newest checkpoint is now that of the other."""
    job = Job(config(steps=9, checkpoint={"every": 2}), tmp_path, held_out=0)

    class Overtaken(FakeFence):
        def check(self) -> None:
            if "rebuild" in job.events:
                raise Fenced("attempt 2 holds the run")

    job.checkpoints.lease = Overtaken()
    job.trainer.lost_at = ["step 4"]
    with pytest.raises(Fenced):
        job.run()
    assert job.events[-2:] == ["rebuild", "load 2"] and job.events.count("rewind 2") == 0


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_trainer_that_is_lost_beside_a_commit_resumes_from_the_newest_whole_one(
    tmp_path: Path, ends_well: bool
) -> None:
    whole = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "whole")
    whole.run()
    job = Job(config(steps=5, checkpoint={"every": 2}), tmp_path / "lost")
    job.trainer.lost_at = ["step 5"]

    def writing(step: int) -> None:
        if step == 4 and "rebuild" not in job.events:
            wait_until(lambda: job.events[-1] == "step 5")
            time.sleep(0.05)
            if not ends_well:
                raise TrainerLost("rank 0 died as well")

    job.trainer.writing = writing
    events = job.run()
    assert events[events.index("rebuild") + 1] == ("load 4" if ends_well else "load 2")
    assert events.count("rebuild") == 1
    assert job.recorder.steps == whole.recorder.steps and job.trainer.updates == 5


@pytest.mark.parametrize(
    ("failed", "told"),
    [
        (None, "^m:f returned None$"),
        (CheckpointError("no space"), "^m:f returned None; and the commit of step 2 failed: no space$"),
        (TrainerLost("rank 0 died"), "^m:f returned None$"),
        (Fenced("attempt 2 holds the run"), "^attempt 2 holds the run$"),
    ],
)
def test_a_run_that_fails_finishes_the_commit_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: GrpoError | None, told: str
) -> None:
    job = Job(config(steps=6, checkpoint={"every": 2}), tmp_path, held_out=0)
    score, broken = job.rewards.score, threading.Event()

    def fails(groups: list[Group]) -> list[Group]:
        if "step 2" in job.events:
            broken.set()
            raise RewardError("m:f returned None")
        return score(groups)

    def writing(step: int) -> None:
        assert broken.wait(SECONDS)
        if failed:
            raise failed

    monkeypatch.setattr(job.rewards, "score", fails)
    job.trainer.writing = writing
    with pytest.raises(Fenced if isinstance(failed, Fenced) else RewardError, match=told):
        job.run()
    assert steps_of(tmp_path) == ([] if failed else ["step_000002"])


def test_a_stop_while_the_trainer_is_lost_says_that_steps_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(config(steps=6, checkpoint={"every": 2}), tmp_path, held_out=0)
    job.trainer.lost_at = ["save 3"]
    interrupt(job, job.rollouts, "generate", 4, monkeypatch)
    with pytest.raises(InterruptedEarly, match="resumes from step 2"):
        job.run()


def test_the_rows_of_a_checkpoint_are_taken_once_the_batches_that_it_holds_are_drawn() -> None:
    """They must tell that the weights of those were verified, which may come after the step."""
    order = []

    def drawn() -> bytes:
        order.append("drawn")
        return b"batches"

    def rows() -> dict[str, bytes]:
        order.append("rows")
        return {"metrics.jsonl": b"rows"}

    made = content(Progress({}, step=3), rows, drawn)
    assert order == ["drawn", "rows"]
    assert made.attachments == {"metrics.jsonl": b"rows", "drawn.jsonl": b"batches"}
    assert made.state["attachments"] == ["drawn.jsonl", "metrics.jsonl"]
