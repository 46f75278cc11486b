"""The GRPO loop against Protocols. It imports neither torch nor ray: `cluster` has the real ones, tests bring fakes.

One step: collect a batch (prompts -> rollouts -> rewards -> advantages), learn from it (policy updates -> weight sync),
record, commit. The controller owns the order; its parts only offer verbs. Every start is a resume: from the newest
checkpoint, or from step 0 where there is none. A lost trainer is the same once more, in the same process.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean

from grpo.algorithm.evaluation import overall
from grpo.checkpoint import Commit, Committer, Content, Progress
from grpo.checkpoint.committer import Durable
from grpo.config import Config
from grpo.errors import Fenced, GrpoError, Interrupted, InterruptedEarly, NoLearningSignal, TrainerLost
from grpo.interfaces import DRAWN, Batch, Components
from grpo.run.clock import Clock, due
from grpo.types import FileRecord, Groups, Stats


class Controller:
    """Runs the loop."""

    def __init__(self, config: Config, components: Components) -> None:
        self.config, self.components = config, components
        self.start = Progress(prompts=components.collector.state())
        self.progress = self.start  # after the last finished step
        self.committed = 0
        self.committer = Committer(components.checkpoints, components.stop, config.deadlines.save * config.train.ranks)
        self.training = False  # the trainer is beyond the last finished step
        self.clock = Clock.of(config, bool(components.collector.held_out))

    def run(self, newest: Commit | None) -> None:
        """Trains up to step `run.steps`, from the `newest` checkpoint, which was verified a moment ago, or from step 0.

        Raises GrpoError; whatever happens, the caller shuts the actors down.
        """
        try:
            self.loop(newest)
        except GrpoError as error:
            self.end_commit(error)
            raise

    def loop(self, newest: Commit | None) -> None:
        """All steps; a lost trainer resumes."""
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
        attachments = {name: commit.read(name) for name in commit.state["attachments"]} if commit else {}
        if commit:
            parts.trainer.load(commit)
        parts.collector.restore(step, self.progress.prompts, attachments.get(DRAWN, b""))
        parts.checkpoints.check()  # who slept for long may have lost its trainer, and the run to a newer start
        parts.recorder.rewind(step, attachments)
        self.training = False
        if parts.weights:
            parts.recorder.starting("sync")
            with parts.recorder.phase("weight_sync"):
                parts.recorder.log_sync(parts.weights.begin(step), parts.weights.digests[step])
        self.evaluate()

    def advance(self) -> None:
        """One step, and what is due after it."""
        parts, step = self.components, self.progress.step + 1
        parts.stop.check()
        if self.committer.ended:
            self.finish_commit()
        with parts.recorder.step(step):
            batch = parts.collector.next(step, sampled=self.commit_if_leaving)
            zero_variance_steps = self.check_signal(batch)
            stats = self.learn(batch, step)
            parts.recorder.log_step(step, batch.groups, batch.stats | stats, batch.skipped, batch.not_drawn)
        score = self.progress.score if parts.collector.held_out else mean_reward(batch.groups)
        self.progress = Progress(batch.prompts, step, zero_variance_steps, self.progress.evaluated, score)
        self.training = False
        self.evaluate()
        last, leaving = step == self.config.run.steps, parts.trainer.leaving
        if due(step, self.config.checkpoint.every) or last or leaving:
            self.commit(wait=last or leaving)
        if leaving and not last:
            parts.trainer.leave()

    def learn(self, batch: Batch, step: int) -> Stats:
        """Policy updates on the batch; the new weights become a version for engines if that is due."""
        parts = self.components
        with parts.recorder.phase("train"):
            self.training = True
            stats = parts.trainer.step(batch.samples, step)
        if parts.weights and self.clock.published(step):
            with parts.recorder.phase("weight_sync"):
                sent = parts.weights.publish(step)
                parts.recorder.log_sync(sent, "" if self.clock.staleness else parts.weights.digests[step])
        return stats

    def evaluate(self) -> None:
        """Scores the held-out prompts with the policy as it is, if that is due."""
        parts, step = self.components, self.progress.step
        if not self.clock.evaluated(step) or self.progress.evaluated == step:
            return
        with parts.recorder.phase("eval"):
            groups, scores = parts.collector.evaluate(step)
            parts.recorder.log_eval(step, groups, scores)
        self.progress = replace(self.progress, evaluated=step, score=overall(scores))

    def commit(self, wait: bool) -> None:
        """Begins to commit the last finished step, once none is under way; the next steps wait for a copy of its state.

        With `wait` they wait until it is durable, as always without `checkpoint.background`.
        """
        parts, progress, background = self.components, self.progress, self.config.checkpoint.background
        with parts.recorder.phase("checkpoint"):
            self.take_commit(self.committer.finish(parts.recorder.alive))
            began = time.monotonic()
            if background:
                parts.trainer.snapshot(progress.step)
            attached, drawn = partial(parts.recorder.attachments, progress.step), parts.collector.drawn(progress.step)
            progress = progress.with_prompts(parts.collector.recorded(progress.step))
            write = self.write if background else parts.trainer.save
            self.committer.begin(progress.step, began, write, lambda: content(progress, attached, drawn))
            if wait or not background:
                self.take_commit(self.committer.finish(parts.recorder.alive))

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """The ranks' files of a commit, beside the next steps; in the committer's thread."""
        with self.components.recorder.lane("trainer", "write", step):
            return self.components.trainer.write(folder, step)

    def finish_commit(self) -> None:
        """Returns once no commit is under way. Raises what the last one failed with."""
        if self.committer.busy or self.committer.ended:
            with self.components.recorder.phase("checkpoint"):
                self.take_commit(self.committer.finish(self.components.recorder.alive))

    def take_commit(self, made: Durable | None) -> None:
        """Takes notice of a commit that has ended."""
        if made is not None:
            self.committed = made.commit.step
            self.components.trainer.committed()
            stats = {"checkpoint/stall_seconds": made.stall_seconds, "checkpoint/durable_seconds": made.seconds}
            size = sum(file.size for file in made.commit.files)
            self.components.recorder.log_commit(made.commit.step, size, stats)

    def end_commit(self, error: GrpoError) -> None:
        """The run ends by this error: before its ranks end, the commit under way does, well or badly.

        A run that was fenced says that alone.
        """
        try:
            self.finish_commit()
        except Fenced as fenced:
            raise fenced from error
        except (TrainerLost, Interrupted):  # they follow from what ended the run
            pass
        except GrpoError as failed:
            if str(failed) not in str(error):
                error.args = (f"{error}; and the commit of step {self.committer.step} failed: {failed}",)

    def commit_if_leaving(self) -> None:
        """Commits what is not committed yet where a rank's node may not last for the rest of the step."""
        if self.components.trainer.leaving and self.committed < self.progress.step:
            self.finish_commit()
            if self.committed < self.progress.step:
                self.commit(wait=True)

    def recover(self, lost: TrainerLost) -> None:
        """New trainer ranks in the place of lost ones, which resume from the newest checkpoint.

        A commit under way has failed with the old ones, or needs nothing more of them and ends well.
        """
        began = time.monotonic()
        with contextlib.suppress(TrainerLost):
            self.finish_commit()
        self.components.collector.stop_ahead()
        self.components.trainer.rebuild()
        self.resume(self.components.checkpoints.newest())
        self.components.recorder.recovered("trainer", lost, time.monotonic() - began)

    def last_commit(self, stopped: Interrupted) -> Interrupted:
        """What a stopped run ends with: all finished steps committed if the time is enough, and a word on it."""
        step = self.progress.step
        with contextlib.suppress(Interrupted, TrainerLost):  # then the checkpoint before is whole
            self.finish_commit()
            if step > self.committed and not self.training and self.components.stop.time_to_commit:
                self.commit(wait=True)
        if step == self.committed and not self.training:
            return Interrupted(f"{stopped}; step {step} is safe, the same command resumes from there")
        return InterruptedEarly(
            f"{stopped}; run.grace_seconds = {self.config.run.grace_seconds:g} left no time to commit step "
            f"{step + self.training}, the same command resumes from step {self.committed}"
        )

    def check_signal(self, batch: Batch) -> int:
        """How many steps in a row had only groups of equal rewards, which teach nothing; too many end the run."""
        silent = all(group.scored and group.zero_variance for group in batch.groups)
        steps = self.progress.zero_variance_steps + 1 if silent else 0
        if steps > self.config.run.max_steps_without_signal:
            rewards = sorted({reward for group in batch.groups for reward in group.rewards_G})
            raise NoLearningSignal(
                f"rewards must differ within groups to teach anything, but in each of the last {steps} steps every "
                f"group had equal rewards (the last ones: {rewards[:4]}); look at samples.jsonl, change the data or "
                "the reward, or raise run.max_steps_without_signal"
            )
        return steps


def content(progress: Progress, attached: Callable[[], Mapping[str, bytes]], drawn: Callable[[], bytes]) -> Content:
    """What a commit holds beside the files of the ranks. The committer's thread asks for it, as late as it can.

    The rows are asked for after what was drawn: they say that its weights were verified, maybe after the step.
    """
    ahead = drawn()
    attachments = {**attached(), **({DRAWN: ahead} if ahead else {})}
    state = {"progress": asdict(progress), "attachments": sorted(attachments)}
    return Content(state, progress.score, attachments)


def mean_reward(groups: Groups) -> float | None:
    """Over all samples; None where nobody has scored them."""
    scored = [reward for group in groups if group.scored for reward in group.rewards_G]
    return fmean(scored) if scored else None
