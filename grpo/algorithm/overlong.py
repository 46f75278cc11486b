"""Completions that are too long: a soft penalty as they come near `rollout.max_tokens`, and none of them in the loss.

The penalty is DAPO's "soft overlong punishment" (arXiv:2503.14476, eq. 13), times a factor. For a completion of n
tokens, with L = max_tokens and a buffer of c tokens, it is

    0 for n <= L - c,    ((L - c) - n) / c for L - c < n <= L,    -1 beyond.

It is kept beside the reward, whose value stays what the reward functions said (accuracy, report), and is added where
advantages are made. Masking (DAPO's "overlong filtering") leaves the truncated completions in the mean and the standard
deviation of their group, as TRL's `mask_truncated_completions` does, but takes all their tokens out of the loss.
"""

from collections.abc import Sequence
from dataclasses import replace

from grpo.config import Algorithm, Config
from grpo.types import Group, Sample


def overlong_penalty(tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's penalty of a completion of so many tokens: from 0 down to -1."""
    return -min(max(tokens - (max_tokens - buffer), 0) / buffer, 1.0)


def penalised(groups: Sequence[Group], config: Config) -> list[Group]:
    """The groups with the penalty of each sample, as `algorithm.overlong` says."""
    overlong, longest = config.algorithm.overlong, config.rollout.max_tokens
    if overlong is None:
        return list(groups)

    def with_penalty(sample: Sample) -> Sample:
        penalty = overlong.penalty * overlong_penalty(sample.sampled_tokens, longest, overlong.buffer)
        return replace(sample, penalty=penalty)

    return [replace(group, samples=tuple(map(with_penalty, group.samples))) for group in groups]


def masked(samples: Sequence[Sample], groups: Sequence[Group], algorithm: Algorithm) -> list[Sample]:
    """The same samples of these groups; those that shall have no part in the loss and its means are masked.

    Truncated ones where `algorithm.mask_truncated` says so, those of groups of equal rewards where
    `algorithm.drop_zero_variance` does.
    """
    silent = [group.zero_variance and algorithm.drop_zero_variance for group in groups for _ in group.samples]
    return [
        replace(sample, masked=True) if drop or (algorithm.mask_truncated and sample.truncated) else sample
        for sample, drop in zip(samples, silent, strict=True)
    ]
