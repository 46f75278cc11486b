"""The GRPO loop against Protocols. It imports neither torch nor ray: `cluster` has the real parts, tests bring fakes.

One step: prompts -> rollouts -> rewards -> advantages -> policy updates -> weight sync -> metrics. The controller owns
the order; rollouts, trainer and weights only offer verbs.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from grpo.advantages import advantages
from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.evaluation import score_evaluation
from grpo.types import Group, Prompt, Sample, Sampling, Stats


class PromptStream(Protocol):
    """An endless, seeded, exactly-once-per-epoch stream of prompts."""

    def take(self, count: int) -> list[Prompt]: ...


class Rollouts(Protocol):
    """Engines that complete prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        """G samples of each prompt, in the order of the prompts; seeds follow from the run's seed, step and prompt."""
        ...


class Rewards(Protocol):
    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with every sample's reward filled in."""
        ...


class Trainer(Protocol):
    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """`train.epochs` passes of clipped policy updates over the batch; the mean statistics of the updates."""
        ...

    def save(self, step: int) -> None:
        """Commits the policy as a Hugging Face folder below the run's folder."""
        ...


class Weights(Protocol):
    def self_test(self) -> Stats:
        """Sends strongly perturbed weights and then the true ones; both must show in the engines' logprobs."""
        ...

    def sync(self, version: int) -> Stats:
        """Sends the trainer's weights to every engine, verified; the engines stamp `version` on their samples."""
        ...


class Recorder(Protocol):
    """Everything a person sees: progress line, metrics, samples."""

    def step(self, step: int) -> AbstractContextManager[None]: ...

    def phase(self, name: str) -> AbstractContextManager[None]: ...

    def log_sync(self, stats: Stats) -> None: ...

    def log_step(self, step: int, groups: Sequence[Group], stats: Stats) -> None: ...

    def log_eval(self, step: int, groups: Sequence[Group], scores: Stats) -> None: ...


class Controller:
    """Runs the loop. `eval_prompts` may be empty: then nothing is evaluated."""

    def __init__(
        self,
        config: Config,
        prompts: PromptStream,
        eval_prompts: Sequence[Prompt],
        rollouts: Rollouts,
        rewards: Rewards,
        trainer: Trainer,
        weights: Weights,
        recorder: Recorder,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.eval_prompts = eval_prompts
        self.rollouts = rollouts
        self.rewards = rewards
        self.trainer = trainer
        self.weights = weights
        self.recorder = recorder
        self.version = 0

    def run(self) -> None:
        """Trains for `run.steps` steps. Raises GrpoError; whatever happens, the caller shuts the actors down."""
        config, record = self.config, self.recorder
        self.sync(version=0, first=True)
        self.evaluate(step=0)
        for step in range(1, config.run.steps + 1):
            with record.step(step):
                with record.phase("rollout"):
                    groups = self.rollouts.generate(
                        self.prompts.take(config.rollout.prompts_per_step), train_sampling(config), step
                    )
                    self.check_versions(groups)
                with record.phase("reward"):
                    groups = self.rewards.score(groups)
                with record.phase("advantage"):
                    batch = advantages(groups, std=config.algorithm.advantage_std)
                with record.phase("train"):
                    stats = self.trainer.step(batch, step)
                if due(step, config.sync.every):
                    self.sync(version=step)
                record.log_step(step, groups, stats)
            if due(step, config.eval.every) or step == config.run.steps:
                self.evaluate(step)
            if due(step, config.checkpoint.every) or step == config.run.steps:
                with record.phase("checkpoint"):
                    self.trainer.save(step)

    def sync(self, version: int, first: bool = False) -> None:
        with self.recorder.phase("weight_sync"):
            if first:
                self.recorder.log_sync(self.weights.self_test())
            self.recorder.log_sync(self.weights.sync(version))
        self.version = version

    def evaluate(self, step: int) -> None:
        """Scores the held-out prompts; a policy that is newer than the engines' weights is synced first."""
        if not self.eval_prompts:
            return
        if step > self.version:
            self.sync(version=step)
        with self.recorder.phase("eval"):
            groups = self.rewards.score(self.rollouts.generate(self.eval_prompts, eval_sampling(self.config), step))
            self.recorder.log_eval(step, groups, score_evaluation(groups))

    def check_versions(self, groups: Iterable[Group]) -> None:
        """No sample may come from other weights than those of the last sync."""
        for group in groups:
            for sample in group.samples:
                if sample.version != self.version:
                    raise WeightSyncError(
                        f"samples must come from weight version {self.version}, but sample {sample.index} of prompt "
                        f"{sample.prompt_id} says {sample.version}; the engine missed a sync, start the run again"
                    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; 0 means never."""
    return every > 0 and step % every == 0


def train_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.samples_per_prompt, rollout.max_tokens, rollout.temperature, rollout.top_p)


def eval_sampling(config: Config) -> Sampling:
    return Sampling(config.eval.samples_per_prompt, config.rollout.max_tokens, config.eval.temperature, 1.0)
