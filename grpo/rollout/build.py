"""How vLLM is set up: engine arguments, the engine's processes, sampling parameters. Loads vLLM."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerFactory

from grpo.config import Config
from grpo.rollout.vllm_private import WatchedMultiprocExecutor, WatchedUniProcExecutor, start_shortcuts
from grpo.types import Sampling

FEWEST_SEQUENCES = 64  # that decode together
MOST_SEQUENCES = {"cpu": 512, "cuda": 1024}
GRAPHS = 512  # sequences up to which vLLM makes CUDA graphs unasked, above 256 for each 16th number
GRAPH_STEP = 16
PROBES = 1  # places of the batch that are kept for health checks
LATENCIES = tuple(digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5))
"""Buckets of waiting and whole requests, in seconds: vLLM's begin at 0.3, where most requests of a step lie below."""
CPU_BATCH_TOKENS = 8192


def engine_args(config: Config, device: str) -> AsyncEngineArgs:
    """The arguments of one engine."""
    model, rollout = config.model, config.rollout
    rows = -(-rollout.prompts_per_step // rollout.fewest_engines) * rollout.samples_per_prompt + PROBES
    sequences = min(max(rows, FEWEST_SEQUENCES), MOST_SEQUENCES[device])
    args = AsyncEngineArgs(
        model=model.path,
        revision=model.revision,
        tokenizer_revision=model.revision,
        trust_remote_code=False,
        dtype=model.dtype,
        max_model_len=model.max_length,
        max_num_seqs=sequences,
        tensor_parallel_size=rollout.tensor_parallel,
        distributed_executor_backend="mp" if rollout.tensor_parallel > 1 else "uni",
        worker_extension_cls="grpo.rollout.receiver.Receiver",
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from: after temperature and top_p
        enable_prefix_caching=True,
        skip_tokenizer_init=not rollout.stop,  # prompts come as ids; only who looks for text needs it there
        gpu_memory_utilization=rollout.engine_memory,
        enforce_eager=rollout.enforce_eager,
        disable_log_stats=True,
        enable_log_requests=False,
        custom_histogram_buckets={"request_latency": list(LATENCIES)},
        seed=config.run.seed,
    )
    if model.fp32_head:
        args.hf_overrides = {"head_dtype": "float32"}
    args.enable_sleep_mode = device == "cuda" and config.cluster.colocate
    if device == "cuda" and sequences > GRAPHS:
        args.max_cudagraph_capture_size = -(-sequences // GRAPH_STEP) * GRAPH_STEP
    if device == "cpu":
        args.enforce_eager = True
        args.kv_cache_memory_bytes = int(rollout.kv_cache_gib * 2**30)
        # A seeded request whose prompt is prefilled in parts kills the CPU build ("Generator does not use offset").
        args.enable_chunked_prefill = False
        args.max_num_batched_tokens = max(CPU_BATCH_TOKENS, model.max_length)
    return args


def start_engine(config: Config, device: str, fork: bool, metrics: ModuleType | None) -> AsyncLLM:
    """Starts the engine core and waits until it has loaded the model. The core ends with this process.

    `metrics`: see `stat_loggers`.
    """
    executor = WatchedMultiprocExecutor if config.rollout.tensor_parallel > 1 else WatchedUniProcExecutor
    with start_shortcuts(device, fork):
        vllm_config = engine_args(config, device).create_engine_config()
        if not (vllm_config.model_config.is_moe or vllm_config.model_config.quantization):
            vllm_config.kernel_config.enable_flashinfer_autotune = False  # it measures kernels that others do not use
        loggers = stat_loggers(metrics)
        return AsyncLLM(vllm_config, executor, log_stats=False, log_requests=False, stat_loggers=loggers)


def stat_loggers(metrics: ModuleType | None) -> list[StatLoggerFactory]:
    """Where the engine's own metrics go: with `ray.util.metrics` to Ray's agent on the node, as ray_vllm_*.

    Without it nobody collects them, and the engine counts nothing.
    """
    if metrics is None:
        return []
    from grpo.rollout import telemetry

    return [telemetry.tell(metrics)]


def sampling_params(sampling: Sampling, seed: int, stop_ids: list[int], stop: Sequence[str] = ()) -> SamplingParams:
    """Parameters of the request that draws one sample; it ends with the token that completes a `stop` text."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        stop=list(stop),
        include_stop_str_in_output=bool(stop),  # whole tokens are kept, so their text is
        stop_token_ids=stop_ids,
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=bool(stop),
        skip_special_tokens=False,  # a stop text may be one
        spaces_between_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def probe_params() -> SamplingParams:
    """Parameters of a request that only has to be answered: one token, whatever it is."""
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def sample_slots(vllm_config: VllmConfig) -> int:
    """Samples that may be drawn at a time, so that vLLM never lets a request wait for a place in the batch."""
    return int(vllm_config.scheduler_config.max_num_seqs) - PROBES


def cache_probe_prompt(vllm_config: VllmConfig) -> list[int]:
    """A prompt that the prefix cache would know when it comes again: a whole block and one token more.

    Empty if no prompt can be that long: then nothing is ever found in the cache.
    """
    length = int(vllm_config.cache_config.block_size) + 1
    vocab_size = vllm_config.model_config.get_vocab_size()
    fits = length < vllm_config.model_config.max_model_len
    return [place % vocab_size for place in range(length)] if fits else []


def tokens(token_ids: Sequence[int], salt: str | None) -> TokensInput:
    """A prompt in vLLM's own form. It finds in the prefix cache only what was computed with the same salt."""
    return tokens_input(list(token_ids), cache_salt=salt)


def prompt_params() -> SamplingParams:
    """Parameters of a request that is made for the logprobs of its prompt."""
    return SamplingParams(
        max_tokens=1,
        temperature=1.0,
        seed=0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def stop_ids(tokenizer: Any, model_config: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's end token and those of the model's generation config."""
    configured = model_config.try_get_generation_config().get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted(token for token in ids if token is not None)
