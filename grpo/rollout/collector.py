"""From prompts to what a step learns from: samples of known weights, their rewards, their advantages.

`InlineCollector` does all of it when it is asked, here and now; nothing is sampled ahead of the step that it is for.
The rule of versions stands here alone: which weights may have made the samples of a step.
"""

from collections.abc import Callable, Mapping, Sequence

from grpo.algorithm.advantages import advantages
from grpo.algorithm.evaluation import score_evaluation
from grpo.algorithm.overlong import masked, penalised
from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.interfaces import Batch, PromptStream, Recorder, Rewards, Rollouts, Weights
from grpo.rewards.built_in import answers_by_source, answers_of
from grpo.run.stopping import StopRequest
from grpo.types import Groups, Prompt, Sampling, Stats


class InlineCollector:
    """A `Collector` that makes each batch when it is asked for. `held_out` may be empty: then nothing is evaluated."""

    def __init__(
        self,
        config: Config,
        prompts: PromptStream,
        rollouts: Rollouts,
        rewards: Rewards,
        weights: Weights,
        recorder: Recorder,
        stop: StopRequest,
        held_out: Sequence[Prompt] = (),
    ) -> None:
        self.config, self.prompts, self.rollouts, self.rewards = config, prompts, rollouts, rewards
        self.weights, self.recorder, self.stop, self.held_out = weights, recorder, stop, held_out

    def collect(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The batch of a step, from the next prompts. Raises WeightSyncError for a sample of other weights."""
        config, record = self.config, self.recorder
        with record.phase("rollout"):
            prompts = self.prompts.take(config.rollout.prompts_per_step)
            groups: Groups = self.rollouts.generate(prompts, train_sampling(config), step)
            check_versions(groups, self.weights.version)
        sampled()
        with record.phase("reward"), self.stop.abortable():
            groups = self.rewards.score(groups)
        with record.phase("advantage"):
            groups = penalised(groups, config)
            samples = masked(advantages(groups, config.algorithm.advantage_std), config.algorithm.mask_truncated)
        return Batch(groups, samples, self.rewards.failures())

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts, and their scores."""
        groups: Groups = self.rollouts.generate(self.held_out, eval_sampling(self.config), step)
        with self.stop.abortable():
            groups = self.rewards.score(groups)
        return groups, score_evaluation(groups, answers_of(self.config.rewards), answers_by_source(self.config))

    def state(self) -> Mapping[str, object]:
        """Where the stream of prompts is."""
        return self.prompts.state()

    def restore(self, state: Mapping[str, object]) -> None:
        """Goes back to where `state` was taken."""
        self.prompts.restore(state)


def check_versions(groups: Groups, version: int) -> None:
    """No sample may come from other weights than those of the last sync. Raises WeightSyncError that names one."""
    for sample in (sample for group in groups for sample in group.samples):
        if {sample.oldest_version, sample.newest_version} != {version}:
            odd = sample.newest_version if sample.oldest_version == version else sample.oldest_version
            raise WeightSyncError(
                f"samples must come from weight version {version}, but sample {sample.index} of prompt "
                f"{sample.prompt_id} says {odd}; the engine missed a sync, start the run again"
            )


def train_sampling(config: Config) -> Sampling:
    """How the prompts of a step are sampled."""
    rollout = config.rollout
    return Sampling(rollout.samples_per_prompt, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


def eval_sampling(config: Config) -> Sampling:
    """How held-out prompts are sampled: from the whole vocabulary."""
    return Sampling(config.eval.samples_per_prompt, config.rollout.max_tokens, config.eval.temperature, 1.0)
