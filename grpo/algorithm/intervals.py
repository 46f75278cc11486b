"""Scores with the error that their sample of prompts leaves: 95 % intervals, and what a whole evaluation samples.

Of one answer a prompt the interval is Wilson's (JASA 22, 1927), which holds near 0 and 1 too. Several answers of one
prompt are not independent, so there prompts are drawn again: the bootstrap's percentiles, with a seed of its own.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

from grpo.algorithm.evaluation import by_prompt, score_evaluation
from grpo.config import Config
from grpo.rewards.built_in import AnswerOf
from grpo.types import Group, Sampling, Stats

Z = 1.959963984540054
"""Of the normal distribution, for 95 %."""
RESAMPLES = 4000
SAMPLES = 8
"""Of a prompt, in a whole evaluation, where `eval.samples_per_prompt` asks for one."""


class Evaluation(NamedTuple):
    """What one pass over the prompts found; `intervals` are the bounds of those scores that are means of prompts."""

    name: str
    prompts: int
    samples: int
    scores: Stats
    intervals: dict[str, tuple[float, float]]


def full_passes(config: Config) -> dict[str, Sampling]:
    """How a whole evaluation samples: greedily, and several times at `eval.temperature` (1 where that is 0)."""
    several = config.eval.samples_per_prompt if config.eval.samples_per_prompt > 1 else SAMPLES
    longest = config.rollout.max_tokens
    return {
        "greedy": Sampling(1, longest, 0.0, 1.0),
        "sampled": Sampling(several, longest, config.eval.temperature or 1.0, 1.0),
    }


def judged(
    name: str, groups: Sequence[Group], answer_of: AnswerOf, by_source: Mapping[str, AnswerOf] | None = None
) -> Evaluation:
    """Scores of scored groups, with intervals."""
    samples = max((len(group.samples) for group in groups), default=0)
    values = by_prompt(groups, answer_of, by_source) if samples else {}
    intervals = {score: interval(values_P) for score, values_P in values.items()}
    return Evaluation(name, len(groups), samples, score_evaluation(groups, answer_of, by_source), intervals)


def interval(values_P: Sequence[float]) -> tuple[float, float]:
    """95 % bounds of the mean over prompts."""
    if set(values_P) <= {0.0, 1.0}:
        return wilson(round(sum(values_P)), len(values_P))
    return bootstrap(values_P)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Bounds of a share of which `right` of `n` independent draws were seen."""
    share, spread = right / n, Z * Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values_P: Sequence[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of prompts that are drawn again, with putting back."""
    import numpy  # not with the module: the controller's loop needs none

    random, values = numpy.random.default_rng(0), numpy.asarray(values_P)
    means = [float(values[random.integers(len(values), size=len(values))].mean()) for _ in range(RESAMPLES)]
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)
