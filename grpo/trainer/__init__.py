"""DeepSpeed: the policy's training, one `PolicyTrainer` in the actor of each rank; the only room that imports it."""

from grpo.trainer.policy_trainer import PolicyTrainer

__all__ = ["PolicyTrainer"]
