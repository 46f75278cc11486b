"""Ray: the actors around vLLM and DeepSpeed, their places, deadlines and end; the only room that imports ray."""

from grpo.cluster.job import evaluate, train
from grpo.cluster.preflight import preflight, preflight_inputs
from grpo.cluster.warmup import warm_up

__all__ = ["evaluate", "preflight", "preflight_inputs", "train", "warm_up"]
