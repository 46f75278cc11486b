"""Which rewards a run uses, and the score of its samples: the weighted sum of all of them."""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from grpo.config import Config, RewardFunction
from grpo.errors import ConfigError, DataError, RewardError, ServiceLost
from grpo.rewards.built_in import BUILT_IN, answer_problem, unreadable
from grpo.rewards.http import HttpRewards
from grpo.rewards.pool import Call, RewardPool
from grpo.rewards.process import KINDS, SERVICE_KINDS, Failure
from grpo.types import Group, Prompt, Sample, Stats

Outcomes = dict[str, list[float | Failure | None]]
"""By name of the reward, of each sample whose source has it, in order. None: was not called, as too many had failed."""
TRIED = 256
Left = dict[str, Iterator[float | Failure | None]]


class Runner(Protocol):
    """What makes many calls of rewards: worker processes, or requests."""

    def run(self, calls: Sequence[Call], tolerated: int) -> Sequence[float | Failure | None]:
        """The outcome of each call, in order; None behind more than `tolerated` failures."""


def check_reward_names(config: Config) -> None:
    """Raises ConfigError for a name that is neither built in nor of the form module:function. Imports nothing."""
    for key, rewards in [
        ("rewards", config.rewards),
        *((f"data.sources.{place}.rewards", source.rewards) for place, source in enumerate(config.data.sources)),
    ]:
        _check_names(key, rewards)


def _check_names(key: str, rewards: Sequence[RewardFunction]) -> None:
    for place, reward in enumerate(rewards):
        module, colon, function = reward.function.partition(":")
        well_formed = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if reward.url is None and reward.function not in BUILT_IN and not well_formed:
            nearest = difflib.get_close_matches(reward.function, BUILT_IN, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(
                f"{key}.{place}.function: a reward is {', '.join(map(repr, BUILT_IN))} or 'module:function', "
                f"got {reward.function!r}{hint}"
            )


class RewardScorer:
    """Scores groups. Built-in rewards run here, the user's functions in worker processes with limits, services answer.

    Creating it checks every function, so do it before anything heavy starts. Close it, or use it as a context manager.
    `isolation` names the fences between reward code and this run that this system does not have.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        """`folder` keeps what services answered. Raises ConfigError for a reward that cannot be used, DeadlineExceeded
        if importing it takes too long.
        """
        check_reward_names(config)
        self.config = config
        services = {reward.name: reward for reward in config.all_rewards if reward.url is not None}
        others = dict.fromkeys(reward.name for reward in config.all_rewards if reward.url is None)
        fenced = [name for name in others if name in BUILT_IN and BUILT_IN[name].worker]
        self.user_functions = [name for name in others if name not in BUILT_IN] + fenced
        self.readers = [name for name in fenced if BUILT_IN[name].readable]
        self.services = list(services)
        self.http = HttpRewards(config, list(services.values()), folder) if services else None
        run = [BUILT_IN[name].worker if name in fenced else name for name in self.user_functions]
        run += [BUILT_IN[name].readable for name in self.readers]
        self.pool = RewardPool(config, run) if run else None
        self.isolation = self.pool.missing if self.pool else ()
        self._failures: Stats = {}
        self.parts: dict[str, list[float]] = {}
        """Of the last `score`: by name of the reward what it gave, before its weight."""
        self._first = ""

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with every sample's reward: the sum of weight x reward over the rewards of their source.

        A failed call is never a 0: its sample, or its group, is left out as `reward_code.on_failure` says, and so is
        a group of which fewer than two samples are left. Raises RewardError if that is not allowed, if more than
        `reward_code.max_failures` of the calls failed or no group is left, and DeadlineExceeded if all together take
        longer than `deadlines.reward`.
        """
        self.parts = {}
        outcomes = self._outcomes(self.pool, self.user_functions, groups)
        outcomes |= self._outcomes(self.http, self.services, groups)
        left = {name: iter(of_samples) for name, of_samples in outcomes.items()}
        scored = [self._scored(group, left) for group in groups]
        kept = [group for group in scored if group.samples]
        if left:
            self._count(outcomes, groups, kept)
        if groups and not kept:
            raise RewardError(f"a step needs groups with rewards, but none of {len(groups)} is left: {self._first}")
        return kept

    def failures(self) -> Stats:
        """Counts of the last `score`: failed calls by kind, dropped samples and groups. Empty without user code."""
        return dict(self._failures)

    def check_answers(self, prompts: Iterable[Prompt]) -> None:
        """Raises DataError for the first prompt whose answer a built-in reward cannot read: it could only score 0.

        What takes a worker to find out is tried on some TRIED answers, spread evenly.
        """
        prompts = list(prompts)
        column = self.config.data.answer_column
        for prompt in prompts:
            if problem := answer_problem(self.config.rewards_of(prompt.source), prompt.answer):
                raise DataError(f"{prompt.id}: {column}: {problem}")
        tried = list({prompt.answer: prompt for prompt in prompts[:: max(1, len(prompts) // TRIED)]}.values())
        for place, name in enumerate(self.readers, start=len(self.user_functions)):
            asked = [prompt for prompt in tried if self._uses(prompt, name)]
            calls = [Call(place, prompt, Sample(prompt.id, 0, (), (), (), ((0, 0),), "stop", "")) for prompt in asked]
            for call, outcome in zip(calls, self.pool.run(calls, len(calls)) if self.pool else [], strict=True):
                if outcome != 1.0:
                    what = f" (it {outcome.what})" if isinstance(outcome, Failure) else ""
                    raise DataError(f"{call.prompt.id}: {column}: {unreadable(name, call.prompt.answer)}{what}")

    def try_services(self, prompt: Prompt) -> None:
        """Asks each service about a row whose answer is right, before anything heavy starts; any reward will do.

        Raises ServiceLost, RewardError.
        """
        sample = Sample(prompt.id, 0, prompt.token_ids, (), (), ((0, 0),), "stop", prompt.answer)
        calls = [Call(place, prompt, sample) for place in range(len(self.services))]
        for outcome in self.http.run(calls, 0) if self.http else ():
            if isinstance(outcome, Failure):
                kind = ServiceLost if outcome.outside else RewardError
                raise kind(self._summary(self.services, calls[:1], [outcome]))

    def close(self) -> None:
        """Ends the workers of the user's functions."""
        if self.pool:
            self.pool.close()

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outcomes(self, runner: Runner | None, names: Sequence[str], groups: Sequence[Group]) -> Outcomes:
        """By name, of each sample in order. Raises RewardError if more calls fail than may, ServiceLost if it was the
        network's fault.
        """
        calls = [
            Call(function, group.prompt, sample)
            for group in groups
            for sample in group.samples
            for function, name in enumerate(names)
            if self._uses(group.prompt, name)
        ]
        if not runner or not calls:
            return {name: [] for name in names}
        reward_code = self.config.reward_code
        tolerated = 0 if reward_code.on_failure == "abort" else math.floor(reward_code.max_failures * len(calls) + 1e-9)
        outcomes = runner.run(calls, tolerated)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if failures:
            self._first = self._summary(names, calls, outcomes)
        if len(failures) > tolerated:
            lost = runner is self.http and sum(not failure.outside for failure in failures) <= tolerated
            kind = ServiceLost if lost else RewardError
            if reward_code.on_failure == "abort":
                raise kind(self._first)
            done = sum(outcome is not None for outcome in outcomes)
            raise kind(
                f"at most reward_code.max_failures = {reward_code.max_failures:g} of {len(calls)} calls of reward "
                f"functions may fail in a step, but {len(failures)} of the first {done} did; {self._first}"
            )
        by_name: Outcomes = {name: [] for name in names}
        for call, outcome in zip(calls, outcomes, strict=True):
            by_name[names[call.function]].append(outcome)
        return by_name

    def _uses(self, prompt: Prompt, name: str) -> bool:
        return any(reward.name == name for reward in self.config.rewards_of(prompt.source))

    def _summary(self, names: Sequence[str], calls: Sequence[Call], outcomes: Sequence[float | Failure | None]) -> str:
        """The first failure, and how many there were of each kind."""
        failures = [
            (call, outcome) for call, outcome in zip(calls, outcomes, strict=True) if isinstance(outcome, Failure)
        ]
        call, first = failures[0]
        counts = Counter(failure.kind for _, failure in failures)
        kinds = [f"{kind} {counts[kind]}" for kind in (*KINDS, *SERVICE_KINDS) if counts[kind]]
        away = "start the service, or correct its url" if first.outside else "correct the service"
        way_out = away if names is self.services else "correct the function"
        return (
            f"reward {names[call.function]} must return a finite number, but for prompt "
            f"{call.prompt.id}, sample {call.sample.index}, it {first.what}; {way_out} "
            f"(failed calls: {', '.join(kinds)})"
        )

    def _scored(self, group: Group, outcomes: Left) -> Group:
        """The group with the samples that have a reward; with none if it is dropped."""
        parts_G = [self._parts(group.prompt, sample, outcomes) for sample in group.samples]
        samples = [
            self._with_reward(sample, parts)
            for sample, parts in zip(group.samples, parts_G, strict=True)
            if parts is not None
        ]
        lost = len(samples) < len(group.samples)
        too_few = len(samples) < min(2, len(group.samples))  # an evaluation may ask for one sample only
        if too_few or (lost and self.config.reward_code.on_failure == "drop_group"):
            samples = []
        return replace(group, samples=tuple(samples))

    def _parts(self, prompt: Prompt, sample: Sample, outcomes: Left) -> tuple[tuple[float, float], ...] | None:
        """(weight, reward) of each reward, or None if one of them failed."""
        called = {name: next(left) for name, left in outcomes.items() if self._uses(prompt, name)}
        parts = []
        for reward in self.config.rewards_of(prompt.source):
            function = BUILT_IN[reward.function].function if reward.name in BUILT_IN else None
            if function:
                part: float | Failure | None = function(prompt.question, sample.text, prompt.answer)
            else:
                part = called[reward.name]
            if not isinstance(part, float):
                return None
            self.parts.setdefault(reward.name, []).append(part)
            parts.append((reward.weight, part))
        return tuple(parts)

    def _with_reward(self, sample: Sample, parts: tuple[tuple[float, float], ...]) -> Sample:
        """The sample with the weighted sum; with its parts too, where those are compared one by one."""
        total = 0.0
        for weight, part in parts:
            total += weight * part
        if not math.isfinite(total):
            raise RewardError(
                f"the weighted sum of the rewards must be finite, but is {total} for prompt {sample.prompt_id}, sample "
                f"{sample.index}; lower the weights or the rewards"
            )
        apart = self.config.algorithm.reward_combination == "normalise_then_sum"
        return replace(sample, reward=total, parts=parts if apart else ())

    def _count(self, outcomes: Outcomes, groups: Sequence[Group], kept: Sequence[Group]) -> None:
        failures = [outcome for of in outcomes.values() for outcome in of if isinstance(outcome, Failure)]
        kinds = Counter(failure.kind for failure in failures)
        samples = sum(len(group.samples) for group in groups) - sum(len(group.samples) for group in kept)
        self._failures = {f"reward/failures_{kind}": float(kinds[kind]) for kind in (*KINDS, *SERVICE_KINDS)}
        self._failures["reward/dropped_samples"] = float(samples)
        self._failures["reward/dropped_groups"] = float(len(groups) - len(kept))
        if self.http:
            self._failures["reward/requests"] = float(self.http.requests)
            self._failures["reward/retries"] = float(self.http.retries)
            self._failures["reward/cached"] = float(self.http.cached)
