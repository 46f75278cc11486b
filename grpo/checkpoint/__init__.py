"""What a run goes on from: whole or absent, read only if every byte is right, refused if the run has changed."""

from grpo.checkpoint.checkpoints import Checkpoints
from grpo.checkpoint.commit import Commit
from grpo.checkpoint.drift import check_drift, config_hash

__all__ = ["Checkpoints", "Commit", "check_drift", "config_hash"]
