"""All that is used of vLLM beyond its public API, as it is in vLLM 0.32.0. Look here first when the pin moves.

Executors for the engine core that end when the process that started it ends, however it ends: the core is told to stop
by its parent; a parent that is killed tells nothing, and the core stays behind, at times busy. Linux can signal the
death of a parent thread, but the thread that starts an engine may end long before its process does, and a frozen core
could not act on it, so a small process watches both: see `run/watchdog.py`.

Shortcuts of the start, what the start of a worker takes, and how one measures its memory beside others on its GPU. The
layerwise reload of weights, which fuses, shards and packs them as at start-up, and what it leaves undone on the CPU.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise, meta
from vllm.model_executor.models import registry
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from grpo.rollout import vllm_core
from grpo.rollout.environment import PARENT, SHARES_GPU, SOCKETS, why_no_fork
from grpo.rollout.forking import in_a_fork
from grpo.rollout.notes import listen
from grpo.run.replaced import replaced
from grpo.run.watchdog import start_watchdog
from grpo.types import TensorRecord


class WatchedUniProcExecutor(UniProcExecutor):
    """The worker in the engine core's own process."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


class WatchedMultiprocExecutor(MultiprocExecutor):
    """One process for each worker (tensor parallel)."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


def end_with_parent() -> None:
    """Lets a watchdog end this process, and what it starts, with the process that is named in the environment.

    From here on what fails in this process is noted.
    """
    start_watchdog(int(os.environ[PARENT]), os.environ[SOCKETS])
    listen()  # again: a core sets up its log anew, which takes handlers away


@contextlib.contextmanager
def start_shortcuts(device: str, fork: bool) -> Iterator[None]:
    """Around the start of an engine: without processes that load vLLM once more."""
    with contextlib.ExitStack() as shortcuts:
        if device == "cpu":
            # vLLM looks at the model's class in a process that loads vLLM again, to keep CUDA out of this one.
            shortcuts.enter_context(replaced(registry, "_run_in_subprocess", lambda look: look()))
        elif fork:
            look = partial(in_a_fork, otherwise=registry._run_in_subprocess)
            shortcuts.enter_context(replaced(registry, "_run_in_subprocess", look))
        if fork:
            # vLLM spawns on the CPU and inside a Ray actor; a forked core does not load everything a second time.
            chosen = partial(_context, str if device == "cpu" else why_no_fork, engine_utils.get_mp_context)
            shortcuts.enter_context(replaced(engine_utils, "get_mp_context", chosen))
        yield


SPAWNED: list[str] = []  # why the core of this process is no fork


def _context(forbids: Callable[[], str], otherwise: Callable[[], BaseContext]) -> BaseContext:
    SPAWNED[:] = [reason for reason in [forbids()] if reason]
    return otherwise() if SPAWNED else get_context("fork")


START_SECONDS: dict[str, float] = {}
"""Of the worker in this process, by phase (`run/start.py`)."""
WORKER_VERBS = {
    "init_device": "device",
    "load_model": "weights",
    "determine_available_memory": "memory",
    "initialize_from_config": "memory",
    "compile_or_warm_up_model": "warm_up",
}
"""What vLLM asks of a worker that starts, and the phase that it is."""


def timed(name: str, phase: str) -> Callable[..., Any]:
    """A verb of a worker, which notes its time without that for compiled code and CUDA graphs, which it notes apart."""
    original = getattr(WorkerWrapperBase, name, None)  # None: the wrapper hands it on to the worker as it is

    def verb(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        began, before = time.monotonic(), _apart(wrapper)
        runner: Any = getattr(wrapper.worker, "model_runner", None)
        with contextlib.ExitStack() as stack:
            if name == "compile_or_warm_up_model" and hasattr(runner, "capture_model"):
                stack.enter_context(replaced(runner, "capture_model", _noted(runner.capture_model, "graphs")))
            if name == "determine_available_memory" and os.environ.get(SHARES_GPU):
                stack.enter_context(own_memory(wrapper.worker))
            result = original(wrapper, *args, **kwargs) if original else getattr(wrapper.worker, name)(*args, **kwargs)
        START_SECONDS["compile"] = wrapper.vllm_config.compilation_config.compilation_time
        seconds = time.monotonic() - began - (_apart(wrapper) - before)
        START_SECONDS[phase] = START_SECONDS.get(phase, 0.0) + max(0.0, seconds)
        return result

    return verb


def _apart(wrapper: Any) -> float:
    """Seconds so far for compiled code and CUDA graphs."""
    return float(wrapper.vllm_config.compilation_config.compilation_time) + START_SECONDS.get("graphs", 0.0)


def _noted(call: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            START_SECONDS[phase] = START_SECONDS.get(phase, 0.0) + time.monotonic() - began

    return noted


CONTEXT = 2**30
"""Bytes of a GPU that a worker takes beside its allocator: CUDA's context, code and libraries."""


@contextlib.contextmanager
def own_memory(worker: Any) -> Iterator[None]:
    """While vLLM measures what a worker needs: what others hold of its GPU counts as free.

    It compares what was free before and after. Engines and ranks that start meanwhile on the same GPU would be taken
    for this worker's need, or for an error where they give memory back.
    """
    snapshot = worker.init_snapshot
    total = snapshot.total_memory

    def free_and_total(device: Any = None) -> tuple[int, int]:
        return total - CONTEXT - int(torch.accelerator.memory_reserved(device)), total

    with replaced(snapshot, "free_memory", total), replaced(torch.accelerator, "get_memory_info", free_and_total):
        yield


# This module is loaded by all processes of an engine, and before their workers start.
assert vllm_core.TellingCore
for _name, _phase in WORKER_VERBS.items():
    setattr(WorkerWrapperBase, _name, timed(_name, _phase))
listen()
# It warns of every layer without weights of its own, in healthy reloads too; `not_loaded` tells those from the others.
logging.getLogger(layerwise.__name__).setLevel(logging.ERROR)


def without_tokens(llm: Any) -> list[str]:
    """vLLM's names of the requests whose first token has not come yet, as far as the front end has heard."""
    states = llm.output_processor.request_states
    return [name for name, state in states.items() if not state.detokenizer.num_output_tokens()]


def begin_reload(model: Any, device: torch.device) -> None:
    """From now on `load_tensor` collects the tensors of each layer."""
    if device.type == "cpu":
        for layer in model.modules():
            # Experts are packed when their kernel is made, and a reload leaves them unpacked unless it is made anew.
            if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
                layer.quant_method.moe_kernel = None
    layerwise.initialize_layerwise_reload(model)


def load_tensor(model: Any, record: TensorRecord, tensor: torch.Tensor) -> list[str]:
    """Hands one tensor to vLLM's loader; a problem if the model does not claim it."""
    try:
        claimed = model.load_weights([(record.name, tensor)])
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        return [f"{record.name} cannot be loaded ({type(error).__name__}: {error})"]
    return [] if claimed else [f"{record.name} is not claimed by the model"]


def not_loaded(model: Any) -> list[str]:
    """Layers that did not get all their weights, asked for before the reload is finished.

    vLLM fuses checkpoint tensors (q, k and v into qkv), so names cannot be counted; each layer counts its elements, and
    one that has them all is finished and forgotten. A vocabulary layer may be padded beyond what a checkpoint holds.
    """
    problems = []
    infos = {layer: layerwise.get_layerwise_info(layer) for layer in model.modules()}
    finished = [layer for layer, info in infos.items() if not info.can_load()]
    loaded = {id(tensor) for layer in finished for tensor in layer.parameters(recurse=False)}
    for name, layer in model.named_modules():
        info = infos[layer]
        if not info.can_load() or layer is tied_head(model):
            continue
        # A layer may name a tensor of another, such as its attention's sinks, or one that is loaded without a count.
        before = (info.kernel_tensors or ({}, {}))[0]
        others = {name for name, tensor in before.items() if id(tensor) in loaded} | meta.SKIP_LOAD_TENSORS
        own = layer.named_parameters(recurse=False)
        wanted = sum(tensor.numel() for name, tensor in own if name not in others)
        if wanted and info.load_numel < (1 if isinstance(layer, VocabParallelEmbedding) else wanted):
            problems.append(f"layer {name} got {info.load_numel} of {wanted} elements")
    return problems


def finish_reload(model: Any, model_config: Any, device: torch.device) -> None:
    """Ends the reload and waits until the device has done it."""
    layerwise.finalize_layerwise_processing(model, model_config)
    head = tied_head(model)
    if head is not None and device.type == "cpu":
        # The head computes with a packed copy made at start-up, which a reload of the embedding leaves stale.
        head.weight = embedding(model).weight
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def embedding(model: Any) -> Any:
    """The layer of the input tokens, whatever the model calls it."""
    layers = (layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding))
    return next(layer for layer in layers if not isinstance(layer, ParallelLMHead))


def tied_head(model: Any) -> Any:
    """The output head if it is a layer of its own that shares the embedding's weights, else None."""
    heads = (layer for layer in model.modules() if isinstance(layer, ParallelLMHead))
    return next(heads, None) if getattr(model.config, "tie_word_embeddings", False) else None
