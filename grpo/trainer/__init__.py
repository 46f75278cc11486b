"""The policy's training: `PolicyTrainer` is what one rank's actor holds. DeepSpeed is imported in `engine.py` only."""

from grpo.trainer.policy_trainer import PolicyTrainer

__all__ = ["PolicyTrainer"]
