"""The GRPO loop against Protocols. It imports neither torch nor ray: `cluster` has the real ones, tests bring fakes.

One step: prompts -> rollouts -> rewards -> advantages -> policy updates -> weight sync -> metrics. The controller owns
the order; rollouts, trainer and weights only offer verbs. Every start is a resume: from the newest checkpoint, or from
step 0 where there is none. A lost trainer is the same once more, in the same process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from grpo.algorithm.advantages import advantages
from grpo.algorithm.evaluation import score_evaluation
from grpo.checkpoint import Commit
from grpo.config import Config
from grpo.errors import Interrupted, InterruptedEarly, NoLearningSignal, TrainerLost, WeightSyncError
from grpo.interfaces import Components
from grpo.run.faults import fault_point
from grpo.types import Groups, Prompt, Sampling


@dataclass(frozen=True)
class Progress:
    """Where the loop is after a finished step; a checkpoint keeps it as JSON."""

    prompts: dict[str, Any]
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
    """Runs the loop. `eval_prompts` may be empty: then nothing is evaluated."""

    def __init__(self, config: Config, components: Components, eval_prompts: Sequence[Prompt]) -> None:
        self.config, self.components, self.eval_prompts = config, components, eval_prompts
        self.start = Progress(prompts=components.prompts.state())
        self.progress = self.start  # after the last finished step
        self.committed = 0
        self.training = False  # the trainer is beyond the last finished step

    def run(self, newest: Commit | None) -> None:
        """Trains up to step `run.steps`, from the `newest` checkpoint, which was verified a moment ago, or from step 0.

        Raises GrpoError; whatever happens, the caller shuts the actors down.
        """
        act: Callable[[], None] | None = partial(self.resume, newest)
        while act:
            try:
                act()
                act = self.advance if self.committed < self.config.run.steps else None
            except TrainerLost as lost:
                act = partial(self.recover, lost)
            except Interrupted as stopped:
                raise self.last_commit(stopped) from None

    def resume(self, commit: Commit | None) -> None:
        """Takes up a checkpoint, or the very start, and brings the engines there."""
        components = self.components
        self.progress = Progress.from_state(commit.state["progress"]) if commit else self.start
        step = self.committed = self.progress.step
        if commit:
            fault_point("resume.found", step)
            components.trainer.load(commit)
        components.prompts.restore(self.progress.prompts)
        components.recorder.rewind(
            step, {name: commit.read(name) for name in commit.state["attachments"]} if commit else {}
        )
        self.training = False
        fault_point("resume.restored", step)
        self.sync(version=step)
        self.evaluate()

    def advance(self) -> None:
        """One step, and what is due after it."""
        config, components, record = self.config, self.components, self.components.recorder
        step = self.progress.step + 1
        components.stop.check()
        with record.step(step):
            with record.phase("rollout"):
                groups = components.rollouts.generate(
                    components.prompts.take(config.rollout.prompts_per_step), train_sampling(config), step
                )
                self.check_versions(groups)
            fault_point("generate.done", step)
            # A node that is about to go away may not last for the rest of the step.
            if components.trainer.leaving and self.committed < step - 1:
                self.commit()
            fault_point("reward.dispatched", step)
            with record.phase("reward"), components.stop.abortable():
                groups = components.rewards.score(groups)
            fault_point("reward.done", step)
            with record.phase("advantage"):
                batch = advantages(groups, std=config.algorithm.advantage_std)
                zero_variance_steps = self.check_signal(groups)
            with record.phase("train"):
                self.training = True
                stats = components.trainer.step(batch, step)
            if due(step, config.sync.every):
                self.sync(version=step)
            record.log_step(step, groups, stats | components.rewards.failures())
        rewards_B = (reward for group in groups for reward in group.rewards_G)
        score = self.progress.score if self.eval_prompts else fmean(rewards_B)
        self.progress = Progress(components.prompts.state(), step, zero_variance_steps, self.progress.evaluated, score)
        self.training = False
        self.evaluate()
        last, leaving = step == config.run.steps, components.trainer.leaving
        if due(step, config.checkpoint.every) or last or leaving:
            self.commit()
        if leaving and not last:
            components.trainer.leave()

    def sync(self, version: int) -> None:
        weights, record = self.components.weights, self.components.recorder
        with record.phase("weight_sync"):
            record.log_sync(weights.sync(version), weights.digest)

    def evaluate(self) -> None:
        """Scores the held-out prompts if that is due; a policy that is newer than the engines' is synced first."""
        components, step, last = self.components, self.progress.step, self.config.run.steps
        wanted = due(step, self.config.eval.every) or step in (0, last)
        if not (self.eval_prompts and wanted) or self.progress.evaluated == step:
            return
        if step > components.weights.version:
            self.sync(version=step)
        with components.recorder.phase("eval"):
            groups = components.rollouts.generate(self.eval_prompts, eval_sampling(self.config), step)
            with components.stop.abortable():
                groups = components.rewards.score(groups)
            scores = score_evaluation(groups)
            components.recorder.log_eval(step, groups, scores)
        self.progress = replace(self.progress, evaluated=step, score=scores["eval/accuracy"])

    def commit(self) -> None:
        """Commits the last finished step."""
        components, progress, began = self.components, self.progress, time.monotonic()
        with components.recorder.phase("checkpoint"):
            folder = components.checkpoints.begin(progress.step)
            records = components.trainer.save(folder, progress.step)
            attachments = components.recorder.attachments()
            state = {"progress": asdict(progress), "attachments": sorted(attachments)}
            commit = components.checkpoints.commit(progress.step, records, state, progress.score, attachments)
            components.recorder.log_commit(commit.step, sum(file.size for file in commit.files))
        self.committed = progress.step
        components.stop.reserve_seconds = time.monotonic() - began

    def recover(self, lost: TrainerLost) -> None:
        """New trainer ranks in the place of lost ones; the next turn of the loop resumes."""
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

    def check_versions(self, groups: Groups) -> None:
        """No sample may come from other weights than those of the last sync."""
        version = self.components.weights.version
        for sample in (sample for group in groups for sample in group.samples):
            if sample.version != version:
                raise WeightSyncError(
                    f"samples must come from weight version {version}, but sample {sample.index} of prompt "
                    f"{sample.prompt_id} says {sample.version}; the engine missed a sync, start the run again"
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


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; 0 means never."""
    return every > 0 and step % every == 0


def train_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.samples_per_prompt, rollout.max_tokens, rollout.temperature, rollout.top_p)


def eval_sampling(config: Config) -> Sampling:
    return Sampling(config.eval.samples_per_prompt, config.rollout.max_tokens, config.eval.temperature, 1.0)
