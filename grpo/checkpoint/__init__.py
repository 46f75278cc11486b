"""What a run goes on from: whole or absent, read only if every byte is right, refused if the run has changed."""

from grpo.checkpoint.checkpoints import Checkpoints
from grpo.checkpoint.commit import Commit

__all__ = ["Checkpoints", "Commit"]
