"""The GRPO loop against Protocols. It imports neither torch nor ray: `cluster` has the real ones, tests bring fakes.

One step: collect a batch (prompts -> rollouts -> rewards -> advantages), learn from it (policy updates -> weight sync),
record, commit. The controller owns the order; its parts only offer verbs. Every start is a resume: from the newest
checkpoint, or from step 0 where there is none. A lost trainer is the same once more, in the same process.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from grpo.checkpoint import Commit
from grpo.config import Config
from grpo.errors import Interrupted, InterruptedEarly, NoLearningSignal, TrainerLost
from grpo.interfaces import Batch, Components
from grpo.run.clock import due
from grpo.types import Groups, Stats


@dataclass(frozen=True)
class Progress:
    """Where the loop is after a finished step; a checkpoint keeps it as JSON."""

    prompts: Mapping[str, object]
    """State of the prompt stream: what the finished steps have consumed, not what the next one has taken."""
    step: int = 0
    zero_variance_steps: int = 0
    """Steps in a row up to this one that had nothing to teach."""
    evaluated: int = -1
    """Step of the last evaluation."""
    score: float | None = None
    """Accuracy of the last evaluation, or the step's mean reward where nothing is evaluated."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """What `asdict` made, also in the words of 0.1.0 as it was first released (`silent`)."""
        words = {"silent": "zero_variance_steps"}
        return cls(**{words.get(name, name): value for name, value in state.items()})


class Controller:
    """Runs the loop."""

    def __init__(self, config: Config, components: Components) -> None:
        self.config, self.components = config, components
        self.start = Progress(prompts=components.collector.state())
        self.progress = self.start  # after the last finished step
        self.committed = 0
        self.training = False  # the trainer is beyond the last finished step

    def run(self, newest: Commit | None) -> None:
        """Trains up to step `run.steps`, from the `newest` checkpoint, which was verified a moment ago, or from step 0.

        Raises GrpoError; whatever happens, the caller shuts the actors down.
        """
        begun = False
        lost: TrainerLost | None = None
        while lost or not begun or self.committed < self.config.run.steps:
            try:
                if lost:
                    self.recover(lost)
                elif begun:
                    self.advance()
                else:
                    self.resume(newest)
                lost = None
            except TrainerLost as error:
                lost = error
            except Interrupted as stopped:
                raise self.last_commit(stopped) from None
            begun = True

    def resume(self, commit: Commit | None) -> None:
        """Takes up a checkpoint, or the very start, and brings the engines there."""
        parts = self.components
        self.progress = Progress.from_state(commit.state["progress"]) if commit else self.start
        step = self.committed = self.progress.step
        if commit:
            parts.trainer.load(commit)
        parts.collector.restore(self.progress.prompts)
        parts.recorder.rewind(step, {name: commit.read(name) for name in commit.state["attachments"]} if commit else {})
        self.training = False
        self.sync(version=step)
        self.evaluate()

    def advance(self) -> None:
        """One step, and what is due after it."""
        parts, step = self.components, self.progress.step + 1
        parts.stop.check()
        with parts.recorder.step(step):
            batch = parts.collector.collect(step, sampled=self.commit_if_leaving)
            zero_variance_steps = self.check_signal(batch.groups)
            stats = self.learn(batch, step)
            parts.recorder.log_step(step, batch.groups, batch.stats | stats)
        score = self.progress.score if parts.collector.held_out else mean_reward(batch.groups)
        self.progress = Progress(parts.collector.state(), step, zero_variance_steps, self.progress.evaluated, score)
        self.training = False
        self.evaluate()
        last, leaving = step == self.config.run.steps, parts.trainer.leaving
        if due(step, self.config.checkpoint.every) or last or leaving:
            self.commit()
        if leaving and not last:
            parts.trainer.leave()

    def learn(self, batch: Batch, step: int) -> Stats:
        """Policy updates on the batch, and the new weights to the engines if that is due."""
        with self.components.recorder.phase("train"):
            self.training = True
            stats = self.components.trainer.step(batch.samples, step)
        if due(step, self.config.sync.every):
            self.sync(version=step)
        return stats

    def sync(self, version: int) -> None:
        """Brings the trainer's weights to the engines."""
        weights, record = self.components.weights, self.components.recorder
        with record.phase("weight_sync"):
            record.log_sync(weights.sync(version), weights.digest)

    def evaluate(self) -> None:
        """Scores the held-out prompts if that is due; a policy that is newer than the engines' is synced first."""
        parts, step, last = self.components, self.progress.step, self.config.run.steps
        wanted = due(step, self.config.eval.every) or step in (0, last)
        if not (parts.collector.held_out and wanted) or self.progress.evaluated == step:
            return
        if step > parts.weights.version:
            self.sync(version=step)
        with parts.recorder.phase("eval"):
            groups, scores = parts.collector.evaluate(step)
            parts.recorder.log_eval(step, groups, scores)
        self.progress = replace(self.progress, evaluated=step, score=scores["eval/accuracy"])

    def commit(self) -> None:
        """Commits the last finished step."""
        parts, progress, began = self.components, self.progress, time.monotonic()
        with parts.recorder.phase("checkpoint"):
            folder = parts.checkpoints.begin(progress.step)
            records = parts.trainer.save(folder, progress.step)
            attachments = parts.recorder.attachments()
            state = {"progress": asdict(progress), "attachments": sorted(attachments)}
            commit = parts.checkpoints.commit(progress.step, records, state, progress.score, attachments)
            parts.recorder.log_commit(commit.step, sum(file.size for file in commit.files))
        self.committed = progress.step
        parts.stop.reserve_seconds = time.monotonic() - began

    def commit_if_leaving(self) -> None:
        """Commits what is not committed yet where a rank's node may not last for the rest of the step."""
        if self.components.trainer.leaving and self.committed < self.progress.step:
            self.commit()

    def recover(self, lost: TrainerLost) -> None:
        """New trainer ranks in the place of lost ones, which resume from the newest checkpoint."""
        began = time.monotonic()
        self.components.trainer.rebuild()
        self.resume(self.components.checkpoints.newest())
        self.components.recorder.recovered("trainer", lost, time.monotonic() - began)

    def last_commit(self, stopped: Interrupted) -> Interrupted:
        """What a stopped run ends with: all finished steps committed if the time is enough, and a word on it."""
        step = self.progress.step
        if step > self.committed and not self.training and self.components.stop.time_to_commit:
            self.commit()
        if step == self.committed and not self.training:
            return Interrupted(f"{stopped}; step {step} is safe, the same command resumes from there")
        return InterruptedEarly(
            f"{stopped}; run.grace_seconds = {self.config.run.grace_seconds:g} left no time to commit step "
            f"{step + self.training}, the same command resumes from step {self.committed}"
        )

    def check_signal(self, groups: Groups) -> int:
        """How many steps in a row had only groups of equal rewards, which teach nothing; too many end the run."""
        steps = self.progress.zero_variance_steps + 1 if all(group.zero_variance for group in groups) else 0
        if steps > self.config.run.max_steps_without_signal:
            rewards = sorted({reward for group in groups for reward in group.rewards_G})
            raise NoLearningSignal(
                f"rewards must differ within groups to teach anything, but in each of the last {steps} steps every "
                f"group had equal rewards (the last ones: {rewards[:4]}); look at samples.jsonl, change the data or "
                "the reward, or raise run.max_steps_without_signal"
            )
        return steps




def mean_reward(groups: Groups) -> float:
    """Over all samples."""
    return fmean(reward for group in groups for reward in group.rewards_G)
