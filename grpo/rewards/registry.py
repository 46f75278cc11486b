"""Which rewards a run uses, and the score of its samples: the weighted sum of all of them."""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from grpo.config import Config
from grpo.errors import ConfigError, DataError, RewardError
from grpo.rewards.gsm8k import boxed, gsm8k, reference_number
from grpo.rewards.process import RewardProcess
from grpo.types import Group, Prompt, Sample

BUILT_IN: dict[str, Callable[[str, str, str], float]] = {"gsm8k": gsm8k, "boxed": boxed}
"""Pure and bounded, so they run in this process. Add a reward here, or name it as module:function."""


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
    """Scores groups. Built-in rewards run here, the user's functions in one child process that can be killed.

    Creating it checks every function, so do it before anything heavy starts. Close it, or use it as a context manager.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for a reward that cannot be used, DeadlineExceeded if importing it takes too long."""
        check_reward_names(config)
        self.config = config
        self.user_functions = [reward.function for reward in config.rewards if reward.function not in BUILT_IN]
        self.process = self._start() if self.user_functions else None

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with every sample's reward: the sum of weight x reward over `config.rewards`.

        Raises RewardError if a function raises, ends its process or returns something else than a finite number, and
        DeadlineExceeded if all samples together take longer than `deadlines.reward`. A failed reward is never a 0.
        """
        if self.process and not self.process.alive:  # killed by an earlier deadline
            self.process.close()
            self.process = self._start()
        with self.process.deadline() if self.process else nullcontext():
            return [
                replace(group, samples=tuple(self._scored(group.prompt, sample) for sample in group.samples))
                for group in groups
            ]

    def check_answers(self, prompts: Iterable[Prompt]) -> None:
        """Raises DataError for the first prompt whose answer a built-in reward cannot read: it could only score 0."""
        if len(self.user_functions) == len(self.config.rewards):
            return
        for prompt in prompts:
            if reference_number(prompt.answer) is None:
                raise DataError(
                    f"{prompt.id}: {self.config.data.answer_column}: the reward compares numbers, but this answer has "
                    f"none: {prompt.answer[-80:]!r}; correct the row or use a reward of your own (module:function)"
                )

    def close(self) -> None:
        if self.process:
            self.process.close()
            self.process = None

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> RewardProcess:
        return RewardProcess(self.user_functions, self.config.deadlines.reward)

    def _scored(self, prompt: Prompt, sample: Sample) -> Sample:
        total = sum(reward.weight * self._reward(reward.function, prompt, sample) for reward in self.config.rewards)
        if not math.isfinite(total):
            raise RewardError(
                f"the weighted sum of the rewards must be finite, but is {total} for prompt {prompt.id}, sample "
                f"{sample.index}; lower the weights or the rewards"
            )
        return replace(sample, reward=total)

    def _reward(self, name: str, prompt: Prompt, sample: Sample) -> float:
        if name in BUILT_IN:
            return BUILT_IN[name](prompt.question, sample.text, prompt.answer)
        assert self.process, "the scorer is closed"
        try:
            return self.process.call(self.user_functions.index(name), prompt.question, sample.text, prompt.answer)
        except RewardError as error:
            raise RewardError(
                f"reward {name} must return a finite number, but for prompt {prompt.id}, sample {sample.index}, "
                f"it {error}; correct the function"
            ) from None
