"""`grpo audit`: from the folder of a run alone, its promises are proved, or the first contradiction is named."""

from grpo.observe.audit.audit import audit
from grpo.observe.audit.proof import Proof

__all__ = ["Proof", "audit"]
