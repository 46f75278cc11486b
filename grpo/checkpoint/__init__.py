"""What a run resumes from: whole or absent, read only if every byte is right, refused if the run has changed."""

from grpo.checkpoint.checkpoints import Checkpoints
from grpo.checkpoint.commit import Commit
from grpo.checkpoint.committer import Committer, Content, Folders
from grpo.checkpoint.progress import Progress

__all__ = ["Checkpoints", "Commit", "Committer", "Content", "Folders", "Progress"]
