"""Ray: the actors around vLLM and DeepSpeed, their places, deadlines and end; the only room that imports ray."""

from grpo.cluster.job import evaluate, train
from grpo.cluster.preflight import preflight

__all__ = ["evaluate", "preflight", "train"]
