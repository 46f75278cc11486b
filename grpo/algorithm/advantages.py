"""Advantages of GRPO: how much better a completion is than its siblings. Plain Python on a few thousand numbers.
A reward is meant with its penalty for length (`overlong.py`).

`advantage = (reward - mean of the group) / (std + 1e-4)`, the std with N - 1 as in torch.std and TRL: of the group
(DeepSeekMath, arXiv 2402.03300), of all rewards of the batch (TRL `scale_rewards="batch"`), or no division at all
(Dr. GRPO, arXiv 2503.20783).
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Literal

from grpo.types import Group, Sample

STD_FLOOR = 1e-4
"""Added to the std, so that nearly equal rewards do not blow up."""


def advantages(groups: Sequence[Group], std: Literal["group", "batch", "none"]) -> list[Sample]:
    """The samples of all groups, in order, with their advantage. A group of equal rewards gets exactly 0.0.

    There are B = P * G of them, fewer if rewards failed: a group is compared with what is left of it.
    `statistics.mean` sums exactly and rounds once: the mean of equal rewards is that reward, bit for bit.
    """
    batch_std = spread([reward for group in groups for reward in group.penalised_G]) if std == "batch" else 0.0
    batch: list[Sample] = []
    for group in groups:
        rewards_G = group.penalised_G
        centre = mean(rewards_G) if rewards_G else 0.0
        scale = {"group": spread(rewards_G) + STD_FLOOR, "batch": batch_std + STD_FLOOR, "none": 1.0}[std]
        for sample, reward in zip(group.samples, rewards_G, strict=True):
            batch.append(replace(sample, advantage=(reward - centre) / scale))
    return batch


def spread(values: Sequence[float]) -> float:
    """Standard deviation with N - 1; 0 for fewer than two values."""
    return stdev(values) if len(values) > 1 else 0.0
