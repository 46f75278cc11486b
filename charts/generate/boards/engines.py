"""Rollout engines: vLLM's own view, by pod. Its metrics come through Ray and are renamed by the PodMonitor."""

from charts.generate.layout import Board
from charts.generate.panels import heat, limits, lines, number, percentiles

# vLLM's counters through Ray appear with their first count; until then it is 0 where the engine counts anything
NOTHING = "0 * sum by (pod) (vllm:prompt_tokens_total{<pod>})"
NOW = [
    number(
        "Engines ready",
        "Engines that hold verified weights and may sample.",
        "suffix:engines",
        {"{{run}}": 'max by (run) (grpo_workers{<run>,role="rollout",state="ready"})'},
        alerts=["GrpoRolloutWorkerLost"],
        width=4,
    ),
    number(
        "Engines lost",
        "Engines that are lost and not yet replaced.",
        "suffix:engines",
        {"{{run}}": 'max by (run) (grpo_workers{<run>,role="rollout",state="lost"})'},
        steps=limits(1, 2),
        alerts=["GrpoRolloutWorkerLost"],
        width=4,
    ),
    number(
        "Running",
        "Requests that all engines are computing now.",
        "suffix:requests",
        {"": "sum(vllm:num_requests_running{<pod>})"},
        width=4,
    ),
    number(
        "Waiting",
        "Requests that wait for room in an engine.",
        "suffix:requests",
        {"": "sum(vllm:num_requests_waiting{<pod>})"},
        width=4,
    ),
    number(
        "Fullest KV cache",
        "Highest use of a KV cache in the last 5 minutes.",
        "percentunit",
        {"": "max(max_over_time(vllm:kv_cache_usage_perc{<pod>}[5m]))"},
        steps=limits(0.8, 0.95),
        decimals=0,
        alerts=["GrpoKVCacheSaturated"],
        width=4,
    ),
    number(
        "Tokens generated",
        "Tokens per second of all engines, mean of the last 5 minutes.",
        "count:tokens/s",
        {"": "sum(rate(vllm:generation_tokens_total{<pod>}[5m]))"},
        decimals=0,
        alerts=["GrpoThroughputDrop"],
        width=4,
    ),
]
LOAD = [
    lines(
        "Generated tokens",
        "Tokens per second by engine. Valleys are the phases in which the engines wait for the trainer.",
        "count:tokens/s",
        {"{{pod}}": "sum by (pod) (rate(vllm:generation_tokens_total{<pod>}[$__rate_interval]))"},
        low=0,
        width=12,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Prompt tokens",
        "Prompt tokens per second by engine, those from the prefix cache included.",
        "count:tokens/s",
        {"{{pod}}": "sum by (pod) (rate(vllm:prompt_tokens_total{<pod>}[$__rate_interval]))"},
        low=0,
        width=12,
    ),
    lines(
        "Requests running",
        "Requests that an engine computes at once.",
        "suffix:requests",
        {"{{pod}}": "sum by (pod) (vllm:num_requests_running{<pod>})"},
        low=0,
    ),
    lines(
        "Requests waiting",
        "Requests that wait, mostly for room in the KV cache.",
        "suffix:requests",
        {"{{pod}}": "sum by (pod) (vllm:num_requests_waiting{<pod>})"},
        low=0,
        alerts=["GrpoKVCacheSaturated"],
    ),
    lines(
        "KV cache in use",
        "Share of the KV cache's blocks, highest value in each interval.",
        "percentunit",
        {"{{pod}}": "max by (pod) (max_over_time(vllm:kv_cache_usage_perc{<pod>}[$__rate_interval]))"},
        low=0,
        high=1,
        alerts=["GrpoKVCacheSaturated"],
    ),
    lines(
        "Preemptions",
        "Requests per minute that lost their place in the cache and are computed again.",
        "suffix:requests/min",
        {"{{pod}}": f"sum by (pod) (rate(vllm:num_preemptions_total{{<pod>}}[$__rate_interval])) * 60 or {NOTHING}"},
        low=0,
        alerts=["GrpoKVCacheSaturated"],
    ),
    lines(
        "Prefix cache hits",
        "Share of prompt tokens found in the prefix cache, which every sync empties; near 1 - 1/G for G samples.",
        "percentunit",
        {
            "{{pod}}": f"(sum by (pod) (rate(vllm:prefix_cache_hits_total{{<pod>}}[$__rate_interval])) or {NOTHING})"
            " / (sum by (pod) (rate(vllm:prefix_cache_queries_total{<pod>}[$__rate_interval])) > 0)"
        },
        low=0,
        high=1,
    ),
    lines(
        "How requests end",
        "Requests per second by reason: stop is an end token, length is max_tokens, abort a lost or stopped step.",
        "reqps",
        {"{{finished_reason}}": "sum by (finished_reason) (rate(vllm:request_success_total{<pod>}[$__rate_interval]))"},
        stack=True,
        low=0,
        alerts=["GrpoTruncation"],
    ),
]
ELASTIC = [
    lines(
        "Elastic engines",
        "Engines that the run asks for (rollout.engines.max), that sample, and that have a node and are about to join.",
        "suffix:engines",
        {"{{state}} {{run}}": "max by (run, state) (grpo_engines{<run>})"},
        low=0,
        alerts=["GrpoRolloutWorkerLost"],
    ),
    lines(
        "Joined and left",
        "Engines in the last hour that joined those that sample, left them, or could not join and are tried again.",
        "suffix:engines",
        {"{{event}} {{run}}": "sum by (run, event) (increase(grpo_engine_events_total{<run>}[1h]))"},
        low=0,
    ),
    lines(
        "The trainer's wait for its batch",
        "Seconds of the last step in which the trainer had no batch: more engines shorten it.",
        "s",
        {"{{run}}": "max by (run) (grpo_rollout_queue_seconds{<run>})"},
        low=0,
    ),
    lines(
        "Engines of a step",
        "Engines that sampled at the end of the last step.",
        "suffix:engines",
        {"{{run}}": "max by (run) (grpo_step_engines{<run>})"},
        low=0,
    ),
]
LATENCY = [
    lines(
        "Time to first token",
        "Median and 99th percentile, waiting included. In a step all requests come at once, so late ones wait.",
        "s",
        percentiles("vllm:time_to_first_token_seconds", "pod", "<pod>"),
        low=0,
    ),
    lines(
        "Time between tokens",
        "Median and 99th percentile of the time from one token of a request to its next.",
        "s",
        percentiles("vllm:inter_token_latency_seconds", "pod", "<pod>"),
        low=0,
    ),
    lines(
        "Duration of a request",
        "Median and 99th percentile. The slowest request ends the rollout phase.",
        "s",
        percentiles("vllm:e2e_request_latency_seconds", "pod", "<pod>"),
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Time in the queue",
        "Median and 99th percentile of the wait before a request is first computed, as fine as the buckets "
        "(1, 2, 5, 10 ms, ...).",
        "s",
        percentiles("vllm:request_queue_time_seconds", "pod", "<pod>"),
        low=0,
        alerts=["GrpoKVCacheSaturated"],
    ),
    lines(
        "Tokens of a request",
        "Median and 99th percentile of the length of a generated text, as fine as the buckets (1, 2, 5, 10, ...).",
        "count:tokens",
        percentiles("vllm:request_generation_tokens", "pod", "<pod>"),
        low=0,
        alerts=["GrpoTruncation"],
    ),
    heat(
        "Tokens of an iteration",
        "Tokens that an engine computes in one pass: the batch size that the GPU really sees.",
        "count:tokens",
        "sum by (le) (increase(vllm:iteration_tokens_total_bucket{<pod>}[$__rate_interval]))",
    ),
]
BOARD = Board(
    "engines",
    "GRPO rollout engines",
    "What vLLM does, engine by engine: load, KV cache and latency.",
    {"Now": NOW, "Elastic engines": ELASTIC, "Load": LOAD, "Latency": LATENCY},
    pods=True,
)
