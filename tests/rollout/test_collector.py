"""From prompts to a scored batch, against fakes; the loop around it is in tests/test_controller.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.rollout.collector import InlineCollector
from grpo.rollout.drawing import Drawer, check_versions
from grpo.run.stopping import StopRequest
from grpo.types import Group, Stats
from tests.fakes import FakePrompts, FakeRecorder, FakeRewards, FakeRollouts, FakeWeights, prompt, sample


def nothing() -> None:
    pass


class CountingRewards(FakeRewards):
    def failures(self) -> Stats:
        return {"reward/dropped_samples": float(self.events.count("score"))}

    @property
    def parts(self) -> dict[str, list[float]]:
        return {"short": [1.0, 0.0, 0.5], "http://judge:8000/v1 (m)": [0.25]}


def make_collector(events: list[str], held_out: int = 0) -> InlineCollector:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 2}
    config = Config.model_validate({"model": {"path": "x"}, "rollout": rollout})
    weights = FakeWeights(events)
    weights.publish(0)
    prompts = [prompt(100 + number) for number in range(held_out)]
    rollouts, rewards = FakeRollouts(events, weights), CountingRewards(events)
    drawer = Drawer(config, FakePrompts(), rollouts, rewards)
    return InlineCollector(drawer, weights, FakeRecorder(events), StopRequest(30), prompts)


def test_a_batch_has_scored_groups_their_samples_in_order_and_what_was_counted() -> None:
    events: list[str] = []
    batch = make_collector(events).next(1, lambda: events.append("sampled"))
    assert events == ["sync 0", "generate 1", "sampled", "score"]
    assert [group.rewards_G for group in batch.groups] == [[1.0, 0.0]] * 3
    rows = [(row.prompt_id, row.index) for row in batch.samples]
    assert rows == [(f"fake:{p}", g) for p in range(3) for g in range(2)]
    assert [row.advantage > 0 for row in batch.samples if row.advantage is not None] == [True, False] * 3
    parts = {"reward/function/short": 0.5, "reward/function/http://judge:8000/v1 (m)": 0.25}
    assert batch.stats == {"reward/dropped_samples": 1.0, "rollout/effective_groups": 1.0} | parts


def test_the_stream_goes_back_to_where_it_was() -> None:
    collector = make_collector([])
    collector.next(1, nothing)
    state = collector.state()
    second = collector.next(2, nothing)
    collector.restore(1, state, b"")
    assert [row.prompt_id for row in collector.next(2, nothing).samples] == [row.prompt_id for row in second.samples]


def test_an_evaluation_takes_no_prompt_of_the_stream() -> None:
    collector = make_collector([], held_out=2)
    groups, scores = collector.evaluate(0)
    assert [group.prompt.id for group in groups] == ["fake:100", "fake:101"] and scores["eval/accuracy"] == 1.0
    assert collector.state() == {"taken": 0}


@pytest.mark.parametrize("version", [2, 4])
def test_samples_of_older_and_of_newer_weights_are_refused(version: int, tmp_path: Path) -> None:
    good = [sample(prompt(1), index, 3) for index in range(2)]
    check_versions([Group(prompt(1), tuple(good))], 3, 3)
    odd = replace(sample(prompt(1), 1, version), index=1)
    with pytest.raises(WeightSyncError, match=f"from weight version 3, but sample 1 of prompt fake:1 says {version}"):
        check_versions([Group(prompt(1), (good[0], odd))], 3, 3)
