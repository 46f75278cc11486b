"""One batch out of the next prompts: samples of known weights, their rewards, their advantages.

With `rollout.refill` groups of equal rewards, which teach nothing, give their places to further prompts, round by
round, in the order of the stream: DAPO's dynamic sampling (arXiv:2503.14476), without prompts that are sampled in vain.
With `data.curriculum` prompts that were always or never right are skipped before they are sampled.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean

from grpo.algorithm.advantages import advantages
from grpo.algorithm.evaluation import score_evaluation
from grpo.algorithm.overlong import masked, penalised
from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.interfaces import Batch, PromptStream, Rewards, Rollouts
from grpo.rewards.built_in import answers_by_source, answers_of
from grpo.run.clock import Clock
from grpo.types import Group, Groups, Prompt, Sample, Sampling, Skipped, Stats


@dataclass
class Draw:
    """A batch in the making: what it keeps, what was skipped for it, and where the prompts were taken up to."""

    step: int
    kept: list[Group] = field(default_factory=list)
    skipped: list[Group] = field(default_factory=list)
    stats: Stats = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0
    taken: int = 0
    prompts: dict[str, object] = field(default_factory=dict)
    not_drawn: list[Skipped] = field(default_factory=list)
    """Prompts whose turn a curriculum skipped on the way."""


class Drawer:
    """Takes, samples, scores. One thread at a time takes prompts, and one at a time has rewards computed."""

    def __init__(self, config: Config, prompts: PromptStream, rollouts: Rollouts, rewards: Rewards) -> None:
        self.config, self.prompts, self.rollouts, self.rewards = config, prompts, rollouts, rewards
        self.clock = Clock.of(config, held_out=False)
        self._scoring = threading.Lock()

    @property
    def rounds(self) -> int:
        """How often a batch may take prompts."""
        return 1 + self.config.rollout.max_refills if self.config.rollout.refill else 1

    def wants(self, draw: Draw) -> bool:
        """Whether the batch has places for further prompts."""
        return draw.rounds < self.rounds and len(draw.kept) < self.config.rollout.prompts_per_step

    def take(self, draw: Draw) -> list[Prompt]:
        """The next prompts, as many as the batch lacks."""
        lacking = self.config.rollout.prompts_per_step - len(draw.kept)
        chosen = self.prompts.choose(lacking, self.clock.known(draw.step))
        draw.prompts = dict(self.prompts.state())
        draw.not_drawn += chosen.skipped
        draw.rounds += 1
        draw.taken += len(chosen.prompts)
        return chosen.prompts

    def sample(self, draw: Draw, prompts: Sequence[Prompt]) -> list[Group]:
        """G samples of each of the prompts that were taken last."""
        first = draw.taken - len(prompts)
        return self.rollouts.generate(prompts, train_sampling(self.config), draw.step, first)

    def score(self, draw: Draw, groups: Groups) -> None:
        """Rewards of these groups; those that teach nothing are skipped where others may still take their places."""
        with self._scoring:
            scored = penalised(self.rewards.score(groups), self.config)
            failures, parts = self.rewards.failures(), self.rewards.parts
        for name, count in failures.items():
            draw.stats[name] = draw.stats.get(name, 0.0) + count
        for name, values in parts.items():
            draw.parts.setdefault(name, []).extend(values)
        for group in scored:
            (draw.skipped if group.zero_variance and draw.rounds < self.rounds else draw.kept).append(group)

    def batch(self, draw: Draw) -> Batch:
        """What the step learns from. The curriculum is told what became of its prompts."""
        samples = masked(advantages(draw.kept, self.config.algorithm), draw.kept, self.config.algorithm)
        groups = [*draw.kept, *draw.skipped]
        share = len(draw.skipped) / max(1, len(groups))
        skipped = {"rollout/skipped_ratio": share} if self.config.rollout.refill else {}
        effective = {"rollout/effective_groups": teaching(draw.kept, samples) / max(1, len(groups))}
        by_function = {f"reward/function/{name}": fmean(values) for name, values in draw.parts.items()}
        if curriculum := self.config.data.curriculum:
            right = [(group.prompt.id, group.right(curriculum.pass_reward), len(group.samples)) for group in groups]
            self.prompts.record(draw.step, right)
            turns = len(groups) + int(draw.stats.get("reward/dropped_groups", 0)) + len(draw.not_drawn)
            why = [difficulty for _, difficulty in draw.not_drawn]
            skipped |= {f"curriculum/skipped_{each}": why.count(each) / max(1, turns) for each in ("easy", "hard")}
        stats = draw.stats | by_function | skipped | effective
        return Batch(draw.kept, samples, stats, draw.skipped, draw.prompts, draw.not_drawn)

    def restore(self, prompts: Mapping[str, object], draws: Sequence[Draw]) -> list[Batch]:
        """Goes back to behind a step, whose batch said `prompts`, and behind what was drawn ahead; makes that again."""
        place = draws[-1].prompts if draws else {}
        self.prompts.restore({**prompts, **place})
        return [self.batch(draw) for draw in draws]

    def evaluate(self, held_out: Sequence[Prompt], step: int) -> Groups:
        """Sampled groups of the held-out prompts, of the weights of that step."""
        groups = self.rollouts.generate(held_out, eval_sampling(self.config), step)
        check_versions(groups, step, step)
        return groups

    def scores(self, groups: Groups) -> tuple[Groups, Stats]:
        """The groups of an evaluation with their rewards, and what they say together."""
        with self._scoring:
            scored = self.rewards.score(groups)
        return scored, score_evaluation(scored, answers_of(self.config.rewards), answers_by_source(self.config))


def teaching(groups: Groups, samples: Sequence[Sample]) -> int:
    """How many of the groups have a sample with an advantage; `samples` are those of all of them, in order."""
    rest = iter(samples)
    own = [list(islice(rest, len(group.samples))) for group in groups]
    return sum(any(sample.advantage and not sample.masked for sample in group) for group in own)


def check_versions(groups: Groups, oldest: int, newest: int) -> None:
    """All samples must come from weights of these versions. Raises WeightSyncError that names one."""
    for sample in (sample for group in groups for sample in group.samples):
        if not oldest <= sample.oldest_version <= sample.newest_version <= newest:
            odd = sample.oldest_version if sample.oldest_version < oldest else sample.newest_version
            wanted = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
            raise WeightSyncError(
                f"samples must come from weight {wanted}, but sample {sample.index} of prompt {sample.prompt_id} says "
                f"{odd}; the engine missed a sync, start the run again"
            )


def train_sampling(config: Config) -> Sampling:
    """How the prompts of a step are sampled."""
    rollout = config.rollout
    return Sampling(rollout.samples_per_prompt, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


def eval_sampling(config: Config) -> Sampling:
    """How held-out prompts are sampled: from the whole vocabulary."""
    return Sampling(config.eval.samples_per_prompt, config.rollout.max_tokens, config.eval.temperature, 1.0)
