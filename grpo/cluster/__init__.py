"""Ray: placement, the actors around vLLM and DeepSpeed, deadlines, shutdown. The only floor that imports ray."""

from grpo.cluster.job import evaluate, train
from grpo.cluster.preflight import preflight

__all__ = ["evaluate", "preflight", "train"]
