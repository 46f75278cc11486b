"""Batches of a warm-up: the rows in the order of the stream, each with its completion, nothing sampled or scored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo.checkpoint import Checkpoints
from grpo.config import Config
from grpo.controller import Controller
from grpo.data.stream import PromptStream
from grpo.interfaces import Components
from grpo.observe.recorder import RunRecorder
from grpo.rollout.supervised import SupervisedCollector
from grpo.run.stopping import StopRequest
from grpo.types import Prompt, Sample, Stats
from tests.fakes import FakeFence, FakeTrainer
from tests.observe.recorders import rows_of
from tests.runs import quiet_progress

ROWS = [Prompt(f"rows:{row}", f"{row}?", "1", (1, row), completion_ids=(7,) * row + (0,)) for row in range(1, 8)]


@dataclass
class Trainer(FakeTrainer):
    """Says as its loss how many updates it has made."""

    evaluated: list[list[Sample]] = field(default_factory=list)

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        super().step(batch, step)
        return {"train/loss": 1.0 / self.updates}

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        self.evaluated.append(list(batch))
        return {"eval/loss": 1.0 / (1 + self.updates)}


def test_a_row_is_its_prompt_and_its_completion():
    collector = SupervisedCollector(PromptStream(ROWS, seed=0), 3, Trainer([]))
    batch = collector.next(5, sampled=lambda: None)
    (prompt, *_), (sample, *_) = [group.prompt for group in batch.groups], batch.samples
    assert (sample.prompt_ids, sample.output_ids) == (prompt.token_ids, prompt.completion_ids)
    assert sample.trained_tokens == len(prompt.completion_ids) and sample.advantage == 1.0
    assert all(map(math.isnan, sample.logprobs)) and sample.lag(5) == 0
    assert not any(group.scored for group in batch.groups)


def test_the_loop_runs_without_engines(tmp_path: Path):
    run = {"steps": 4, "dir": str(tmp_path), "max_steps_without_signal": 0}
    config = Config.model_validate({"model": {"path": "x"}, "run": run, "eval": {"every": 2}})
    checkpoints, trainer = Checkpoints(config, tmp_path, FakeFence()), Trainer([])
    collector = SupervisedCollector(PromptStream(ROWS, seed=0), 3, trainer, ROWS[:2])
    with RunRecorder(config, tmp_path, quiet_progress(config), ["grpo", "sft"], engines=False) as recorder:
        Controller(config, Components(collector, trainer, None, checkpoints, recorder, StopRequest(30))).run(None)
        assert recorder.health.readiness() == (True, "ready")
    rows = rows_of(tmp_path)
    assert [row["event"] for row in rows] == ["start", "eval", "step", "step", "eval", "step", "step", "eval", *END]
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["train/loss"] for row in steps] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert steps[0]["rollout/completion_tokens"] == sum(len(sample.output_ids) for sample in trainer.batches[0])
    assert not [key for key in steps[0] if key.startswith(("reward/", "sync/")) or key == "pipeline/rollout_idle"]
    seen = [sample.prompt_id for batch in trainer.batches for sample in batch]
    assert sorted(seen[: len(ROWS)]) == [prompt.id for prompt in ROWS]  # each once before any comes again
    newest = checkpoints.newest()
    assert newest and newest.step == 4 and newest.state["progress"]["score"] == -1 / 5
    assert len(trainer.evaluated) == 3 and {len(batch) for batch in trainer.evaluated} == {2}


END = ["commit", "checkpoint", "end"]
