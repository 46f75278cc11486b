"""Which rewards a run uses, and the score of its samples: the weighted sum of all of them."""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from grpo.config import Config
from grpo.errors import ConfigError, DataError, RewardError
from grpo.rewards.built_in import BUILT_IN, answer_problem
from grpo.rewards.pool import Call, RewardPool
from grpo.rewards.process import KINDS, Failure
from grpo.types import Group, Prompt, Sample, Stats

Outcomes = Sequence[float | Failure | None]
"""Of the calls: by group, sample and function. None: was not called, as too many had failed."""


def check_reward_names(config: Config) -> None:
    """Raises ConfigError for a name that is neither built in nor of the form module:function. Imports nothing."""
    for place, reward in enumerate(config.rewards):
        module, colon, function = reward.function.partition(":")
        well_formed = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if reward.function not in BUILT_IN and not well_formed:
            nearest = difflib.get_close_matches(reward.function, BUILT_IN, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(
                f"rewards.{place}.function: a reward is {', '.join(map(repr, BUILT_IN))} or 'module:function', "
                f"got {reward.function!r}{hint}"
            )


class RewardScorer:
    """Scores groups. Built-in rewards run here, the user's functions in worker processes with limits.

    Creating it checks every function, so do it before anything heavy starts. Close it, or use it as a context manager.
    `isolation` names the fences between reward code and this run that this system does not have.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for a reward that cannot be used, DeadlineExceeded if importing it takes too long."""
        check_reward_names(config)
        self.config = config
        self.user_functions = list(dict.fromkeys(r.function for r in config.rewards if r.function not in BUILT_IN))
        self.pool = RewardPool(config, self.user_functions) if self.user_functions else None
        self.isolation = self.pool.missing if self.pool else ()
        self._failures: Stats = {}

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with every sample's reward: the sum of weight x reward over `config.rewards`.

        A failed call is never a 0: its sample, or its group, is left out as `reward_code.on_failure` says, and so is
        a group of which fewer than two samples are left. Raises RewardError if that is not allowed, if more than
        `reward_code.max_failures` of the calls failed or no group is left, and DeadlineExceeded if all together take
        longer than `deadlines.reward`.
        """
        calls = [
            Call(function, group.prompt, sample)
            for group in groups
            for sample in group.samples
            for function in range(len(self.user_functions))
        ]
        outcomes = self._outcomes(calls)
        left = iter(outcomes)
        scored = [self._scored(group, left) for group in groups]
        kept = [group for group in scored if group.samples]
        if self.pool:
            self._count(outcomes, groups, kept)
        if groups and not kept:
            raise RewardError(
                f"a step needs groups with rewards, but none of {len(groups)} is left: {self._summary(calls, outcomes)}"
            )
        return kept

    def failures(self) -> Stats:
        """Counts of the last `score`: failed calls by kind, dropped samples and groups. Empty without user code."""
        return dict(self._failures)

    def check_answers(self, prompts: Iterable[Prompt]) -> None:
        """Raises DataError for the first prompt whose answer a built-in reward cannot read: it could only score 0."""
        for prompt in prompts:
            if problem := answer_problem(self.config.rewards, prompt.answer):
                raise DataError(f"{prompt.id}: {self.config.data.answer_column}: {problem}")

    def close(self) -> None:
        """Ends the workers of the user's functions."""
        if self.pool:
            self.pool.close()

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outcomes(self, calls: Sequence[Call]) -> Outcomes:
        """Calls the user's functions. Raises RewardError if more calls fail than may."""
        if not self.pool or not calls:
            return []
        reward_code = self.config.reward_code
        tolerated = 0 if reward_code.on_failure == "abort" else math.floor(reward_code.max_failures * len(calls) + 1e-9)
        outcomes = self.pool.run(calls, tolerated)
        failed = sum(isinstance(outcome, Failure) for outcome in outcomes)
        if failed > tolerated:
            summary = self._summary(calls, outcomes)
            if reward_code.on_failure == "abort":
                raise RewardError(summary)
            done = sum(outcome is not None for outcome in outcomes)
            raise RewardError(
                f"at most reward_code.max_failures = {reward_code.max_failures:g} of {len(calls)} calls of reward "
                f"functions may fail in a step, but {failed} of the first {done} did; {summary}"
            )
        return outcomes

    def _summary(self, calls: Sequence[Call], outcomes: Outcomes) -> str:
        """The first failure, and how many there were of each kind."""
        failures = [
            (call, outcome) for call, outcome in zip(calls, outcomes, strict=True) if isinstance(outcome, Failure)
        ]
        call, first = failures[0]
        counts = Counter(failure.kind for _, failure in failures)
        return (
            f"reward {self.user_functions[call.function]} must return a finite number, but for prompt "
            f"{call.prompt.id}, sample {call.sample.index}, it {first.what}; correct the function "
            f"(failed calls: {', '.join(f'{kind} {counts[kind]}' for kind in KINDS if counts[kind])})"
        )

    def _scored(self, group: Group, outcomes: Iterator[float | Failure | None]) -> Group:
        """The group with the samples that have a reward; with none if it is dropped."""
        rewards_G = [self._reward(group.prompt, sample, outcomes) for sample in group.samples]
        samples = [
            replace(sample, reward=reward)
            for sample, reward in zip(group.samples, rewards_G, strict=True)
            if reward is not None
        ]
        lost = len(samples) < len(group.samples)
        too_few = len(samples) < min(2, len(group.samples))  # an evaluation may ask for one sample only
        if too_few or (lost and self.config.reward_code.on_failure == "drop_group"):
            samples = []
        return replace(group, samples=tuple(samples))

    def _reward(self, prompt: Prompt, sample: Sample, outcomes: Iterator[float | Failure | None]) -> float | None:
        """The weighted sum, or None if a part of it failed."""
        by_function = {name: next(outcomes) for name in self.user_functions}
        total = 0.0
        for reward in self.config.rewards:
            if reward.function in BUILT_IN:
                function = BUILT_IN[reward.function].function
                part: float | Failure | None = function(prompt.question, sample.text, prompt.answer)
            else:
                part = by_function[reward.function]
            if not isinstance(part, float):
                return None
            total += reward.weight * part
        if not math.isfinite(total):
            raise RewardError(
                f"the weighted sum of the rewards must be finite, but is {total} for prompt {prompt.id}, sample "
                f"{sample.index}; lower the weights or the rewards"
            )
        return total

    def _count(self, outcomes: Outcomes, groups: Sequence[Group], kept: Sequence[Group]) -> None:
        kinds = Counter(outcome.kind for outcome in outcomes if isinstance(outcome, Failure))
        samples = sum(len(group.samples) for group in groups) - sum(len(group.samples) for group in kept)
        self._failures = {f"reward/failures_{kind}": float(kinds[kind]) for kind in KINDS}
        self._failures["reward/dropped_samples"] = float(samples)
        self._failures["reward/dropped_groups"] = float(len(groups) - len(kept))
