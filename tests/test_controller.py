"""The order of the loop, against fakes of all its parts."""

from dataclasses import dataclass, field

import pytest

from grpo.config import Config
from grpo.controller import Controller, due
from grpo.errors import RewardError, WeightSyncError
from grpo.types import Sampling
from tests.fakes import FakePrompts, FakeRecorder, FakeRewards, FakeRollouts, FakeTrainer, FakeWeights, prompt


@dataclass
class Job:
    """A controller and its fakes, which share one list of events."""

    config: Config
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

    def run(self) -> list[str]:
        held_out = [prompt(1000 + number) for number in range(self.held_out)]
        parts = (self.rollouts, self.rewards, self.trainer, self.weights, self.recorder)
        Controller(self.config, self.prompts, held_out, *parts).run()
        return self.events


def config(steps: int = 2, **sections: dict[str, object]) -> Config:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 16, "temperature": 0.9, "top_p": 0.8}
    return Config.model_validate({"model": {"path": "x"}, "run": {"steps": steps}, "rollout": rollout} | sections)


def test_the_order_of_a_run() -> None:
    assert Job(config(steps=2)).run() == [
        "self_test",
        "sync 0",
        *("generate 0", "score", "eval 0"),
        *("generate 1", "score", "step 1", "sync 1", "log_step 1"),
        *("generate 2", "score", "step 2", "sync 2", "log_step 2"),
        *("generate 2", "score", "eval 2"),
        "save 2",
    ]


def test_every_phase_is_recorded_inside_its_step() -> None:
    job = Job(config(steps=1))
    job.run()
    inside = [f"step 1/{phase}" for phase in ("rollout", "reward", "advantage", "train", "weight_sync")]
    assert job.recorder.phases == ["weight_sync", "eval", *inside, "eval", "checkpoint"]
    assert job.recorder.open == []


def test_a_batch_has_the_rows_of_the_step_in_order_with_their_advantages() -> None:
    job = Job(config(steps=2))
    job.run()
    first, second = job.trainer.batches
    assert [(row.prompt_id, row.index) for row in first] == [(f"fake:{p}", g) for p in range(3) for g in range(2)]
    assert [row.prompt_id for row in second[::2]] == ["fake:3", "fake:4", "fake:5"]
    assert [row.reward for row in first] == [1.0, 0.0] * 3
    # rewards 1 and 0: mean 0.5, standard deviation sqrt(0.5) with n - 1
    assert [row.advantage for row in first] == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)] * 3)
    assert job.prompts.taken == 6


def test_training_and_evaluation_sample_differently() -> None:
    job = Job(config(steps=1, eval={"samples_per_prompt": 4, "temperature": 0.0}))
    job.run()
    training, evaluation = Sampling(2, 16, 0.9, 0.8), Sampling(4, 16, 0.0, 1.0)
    assert job.rollouts.samplings == [evaluation, training, evaluation]


def test_the_recorder_gets_the_statistics_of_update_and_sync() -> None:
    job = Job(config(steps=2, eval={"samples_per_prompt": 2}))
    job.run()
    assert job.recorder.steps == {1: {"loss": 1.0}, 2: {"loss": 2.0}}
    assert job.recorder.syncs == [{"self_test": 1.0}, *({"sync_version": float(version)} for version in range(3))]
    assert list(job.recorder.scores) == [0, 2] and job.recorder.scores[0]["eval/accuracy"] == 0.5


def test_without_held_out_prompts_nothing_is_evaluated() -> None:
    events = Job(config(steps=1), held_out=0).run()
    assert events == ["self_test", "sync 0", "generate 1", "score", "step 1", "sync 1", "log_step 1", "save 1"]


def test_a_sync_every_second_step_leaves_samples_one_version_behind() -> None:
    job = Job(config(steps=5, sync={"every": 2}), held_out=0)
    events = job.run()
    assert [event for event in events if event.startswith("sync")] == ["sync 0", "sync 2", "sync 4"]
    assert job.rollouts.versions == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)]
    assert [{row.version for row in batch} for batch in job.trainer.batches] == [{0}, {0}, {2}, {2}, {4}]


def test_an_evaluation_sees_the_newest_policy() -> None:
    job = Job(config(steps=3, sync={"every": 2}, eval={"every": 1}))
    job.run()
    evaluated = [(step, version) for step, version in job.rollouts.versions if step == version]
    assert evaluated == [(0, 0), (1, 1), (2, 2), (3, 3)]
    # the training steps then start from what the evaluation has synced
    assert [(step, version) for step, version in job.rollouts.versions if step != version] == [(1, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"),
    [(0, [0, 5], [5]), (2, [0, 2, 4, 5], [2, 4, 5]), (5, [0, 5], [5]), (9, [0, 5], [5])],
)
def test_how_often_is_evaluated_and_saved(every: int, evaluated: list[int], saved: list[int]) -> None:
    events = Job(config(steps=5, eval={"every": every}, checkpoint={"every": every})).run()
    assert [event for event in events if event.startswith("eval")] == [f"eval {step}" for step in evaluated]
    assert [event for event in events if event.startswith("save")] == [f"save {step}" for step in saved]


def test_a_sample_of_another_version_stops_the_run_before_it_is_trained_on() -> None:
    job = Job(config(steps=3), lost=frozenset({1}))
    with pytest.raises(
        WeightSyncError, match="from weight version 1, but sample 0 of prompt fake:3 says 0; the engine missed"
    ):
        job.run()
    assert job.events[-2:] == ["log_step 1", "generate 2"]
    assert len(job.trainer.batches) == 1


def test_an_engine_that_never_got_the_first_weights_is_noticed() -> None:
    job = Job(config(steps=1), held_out=0, lost=frozenset({0}))
    with pytest.raises(WeightSyncError, match="weight version 0, but .* says -1"):
        job.run()


def test_an_error_ends_the_run_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_groups: object) -> None:
        raise RewardError("m:f returned None")

    job = Job(config(steps=3), held_out=0)
    monkeypatch.setattr(job.rewards, "score", fails)
    with pytest.raises(RewardError):
        job.run()
    assert job.events == ["self_test", "sync 0", "generate 1"]
    assert job.recorder.open == []


@pytest.mark.parametrize(
    ("step", "every", "expected"), [(1, 0, False), (0, 1, True), (3, 3, True), (4, 3, False), (6, 3, True)]
)
def test_due(step: int, every: int, expected: bool) -> None:
    assert due(step, every) is expected
