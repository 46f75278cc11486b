"""Ray: the actors around vLLM and DeepSpeed, their places, deadlines and end; the only room that imports ray."""

from grpo.cluster.job import evaluate, train
from grpo.cluster.preflight import preflight
from grpo.cluster.warmup import warm_up

__all__ = ["evaluate", "preflight", "train", "warm_up"]
