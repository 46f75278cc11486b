"""Rewards: what a completion is worth. Built in are `gsm8k` and `boxed`; any other is `module:function` of the user."""

from grpo.rewards.gsm8k import boxed, boxed_number, gsm8k, marked_number, reference_number
from grpo.rewards.registry import RewardScorer, check_reward_names

__all__ = ["RewardScorer", "boxed", "boxed_number", "check_reward_names", "gsm8k", "marked_number", "reference_number"]
