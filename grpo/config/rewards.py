"""The terms of the reward."""

from pydantic import Field

from grpo.config.fields import RewardName
from grpo.config.section import Section


class RewardFunction(Section):
    """One term of the reward."""

    function: RewardName = "gsm8k"
    """A built-in reward (gsm8k, boxed, exact …) or "module:function" with (prompt, completion, answer) -> float."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Factor of this reward in the sum."""
