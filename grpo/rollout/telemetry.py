"""vLLM's own metrics, told to Ray's agent on the node, which shows them as ray_vllm_*. Loads vLLM."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# vLLM reaches for Ray's metrics through Ray Serve, which takes 1.7 s and 75 MB to load and needs more packages.
sys.modules.setdefault("ray.serve", None)  # type: ignore[arg-type]

from vllm.v1.engine import EngineCoreOutput  # noqa: E402
from vllm.v1.metrics import ray_wrappers  # noqa: E402
from vllm.v1.metrics.stats import IterationStats  # noqa: E402

MOST_GAPS = 8
"""Tokens of one iteration whose latency is told. Ray takes 25 microseconds for each, which thousands of tokens a second
would feel; the tokens of an iteration come at the same moment, so that a few say as much as all."""


class RayStatLogger(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's, but for the number of observations of vllm:inter_token_latency_seconds."""

    def record(self, scheduler_stats: Any, iteration_stats: IterationStats | None, *args: Any, **options: Any) -> None:
        if iteration_stats is not None:
            gaps = iteration_stats.inter_token_latencies_iter
            iteration_stats.inter_token_latencies_iter = gaps[:: -(-len(gaps) // MOST_GAPS) or 1]
        super().record(scheduler_stats, iteration_stats, *args, **options)


def gaps_of_parts(update: Callable[..., None]) -> Callable[..., None]:
    """vLLM counts one gap for each output, but several tokens may come with one: `holding.py`."""

    def update_from_output(stats: IterationStats, output: EngineCoreOutput, *args: Any) -> None:
        before = len(stats.inter_token_latencies_iter)
        update(stats, output, *args)
        if len(stats.inter_token_latencies_iter) > before:
            stats.inter_token_latencies_iter[-1] /= max(1, len(output.new_token_ids))

    return update_from_output


IterationStats.update_from_output = gaps_of_parts(IterationStats.update_from_output)  # type: ignore[method-assign]


def tell(metrics: ModuleType) -> type[RayStatLogger]:
    """The stat logger that tells `metrics`, which is `ray.util.metrics`."""
    ray_wrappers.ray_metrics = metrics
    return RayStatLogger
