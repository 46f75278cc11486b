"""Advantages of GRPO: how much better a completion is than its siblings. Plain Python on a few thousand numbers.
A reward is meant with its penalty for length (`overlong.py`).

`advantage = (reward - baseline) / (std + 1e-4)`. The baseline is the mean of the group, or of its other members (RLOO,
arXiv:2402.14740). The std, with N - 1 as in torch.std and TRL, is that of the group (DeepSeekMath, arXiv:2402.03300),
of all rewards of the batch (TRL `scale_rewards="batch"`), of all centred rewards of the batch (`whiten`: REINFORCE++,
arXiv:2501.03262; ScaleRL, arXiv:2510.13786), or there is no division (Dr. GRPO, arXiv:2503.20783).

Several rewards are compared as their weighted sum; or each is normalised within its group before they are added, and
the sum is whitened, so that none drowns the others (GDPO, arXiv:2601.05242).
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev

from grpo.config import Algorithm
from grpo.types import Group, Sample

STD_FLOOR = 1e-4
"""Added to the std, so that nearly equal rewards do not blow up."""


def advantages(groups: Sequence[Group], algorithm: Algorithm) -> list[Sample]:
    """The samples of all groups, in order, with their advantage. A group of equal rewards gets exactly 0.0.

    There are B = P * G of them, fewer if rewards failed: a group is compared with what is left of it, one alone with
    nothing.
    """
    apart = algorithm.reward_combination == "normalise_then_sum"
    centred_PG = [summed(group) if apart else centred(group.penalised_G, algorithm) for group in groups]
    std = "whiten" if apart else algorithm.advantage_std
    batch_std = 0.0
    if std == "batch":
        batch_std = spread([reward for group in groups for reward in group.penalised_G])
    elif std == "whiten":
        batch_std = spread([value for centred_G in centred_PG for value in centred_G])
    batch: list[Sample] = []
    for group, centred_G in zip(groups, centred_PG, strict=True):
        own = spread(group.penalised_G) if std == "group" else batch_std
        scale = 1.0 if std == "none" else own + STD_FLOOR
        for sample, value in zip(group.samples, centred_G, strict=True):
            batch.append(replace(sample, advantage=value / scale))
    return batch


def centred(rewards_G: Sequence[float], algorithm: Algorithm) -> list[float]:
    """The rewards of a group, each less its baseline.

    `statistics.mean` sums exactly and rounds once: the mean of equal rewards is that reward, bit for bit.
    """
    if not rewards_G:
        return []
    centre, count = mean(rewards_G), len(rewards_G)
    if algorithm.baseline == "leave_one_out":  # R - mean of the others = (R - mean of all) G / (G - 1)
        return [(reward - centre) * count / max(count - 1, 1) for reward in rewards_G]
    return [reward - centre for reward in rewards_G]


def summed(group: Group) -> list[float]:
    """Of each sample of a group: the weighted sum of its rewards, each normalised within the group.

    Samples without parts, which a run that summed first has drawn, have one reward: their sum.
    """
    parts_G = [sample.parts or ((1.0, reward),) for sample, reward in zip(group.samples, group.rewards_G, strict=True)]
    totals_G = [0.0] * len(parts_G)
    for parts in zip(*parts_G, strict=True):
        rewards_G = [reward for _, reward in parts]
        centre, scale = mean(rewards_G), spread(rewards_G) + STD_FLOOR
        for row, (weight, reward) in enumerate(parts):
            totals_G[row] += weight * (reward - centre) / scale
    return totals_G


def spread(values: Sequence[float]) -> float:
    """Standard deviation with N - 1; 0 for fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0
