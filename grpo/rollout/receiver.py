"""What runs inside every vLLM worker: takes the policy's weights and says what it took.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls it by name (`collective_rpc`), with plain data.
The tensors go through vLLM's layerwise reload, which also fuses, shards and packs them as at start-up.
"""

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from grpo.config import Config
from grpo.types import TensorRecord
from grpo.weights import Transport, make_transport

PlainRecord = tuple[str, tuple[int, ...], str, str]
"""Name, shape, dtype, digest: what crosses vLLM's process border."""


class Receiver:
    """A worker's end of the weight transfer. The attributes below are the worker's own."""

    rank: int
    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    transport: Transport | None = None

    def join_transfer(self, config: str, host: str, port: int, rank_offset: int, world_size: int) -> None:
        """Joins the transfer group as rank `rank_offset` plus this worker's rank. `config` is the run's, as JSON."""
        parsed = Config.model_validate_json(config)
        rank = rank_offset + self.rank
        self.transport = make_transport(parsed, self.device.type, host, port, rank, world_size)

    def receive_tensors(self, expected: list[list[Any]]) -> tuple[list[PlainRecord], list[str]]:
        """Loads what the trainer sends. `expected` is [[name, shape, dtype], ...] as the trainer announced it.

        Returns what arrived, in order, and what is wrong with it. With anything wrong the model must not be used. Reads to
        the end of the stream whatever is wrong, so that no other rank waits for this one.
        """
        assert self.transport is not None, "receive_tensors before join_transfer"
        announced = {(name, tuple(shape), dtype) for name, shape, dtype in expected}
        model = self.model_runner.get_model()
        received: list[PlainRecord] = []
        problems: list[str] = []
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)
            try:
                for record, tensor in self.transport.receive():
                    received.append((record.name, record.shape, record.dtype, record.digest))
                    if (record.name, record.shape, record.dtype) in announced:
                        problems += load(model, record, tensor)
                    else:
                        problems.append(f"{record.name} {record.shape} {record.dtype} was not announced")
                problems += unloaded(model)
            finally:
                finalize_layerwise_reload(model, self.model_config)
                refresh_tied_head(model, self.device)
        torch.accelerator.synchronize() if self.device.type == "cuda" else None
        return received, problems


def load(model: torch.nn.Module, record: TensorRecord, tensor: torch.Tensor) -> list[str]:
    """Hands one tensor to vLLM's loader; a problem if the model does not claim it."""
    try:
        claimed = model.load_weights([(record.name, tensor)])
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        return [f"{record.name} cannot be loaded: {error}"]
    return [] if claimed else [f"{record.name} is not claimed by the model"]


def unloaded(model: torch.nn.Module) -> list[str]:
    """Layers that did not get all their weights, asked for before the reload is finalised.

    vLLM fuses checkpoint tensors (q, k and v into qkv), so names cannot be counted; each layer counts its elements. A
    layer that has them all is done and forgotten. Vocabulary layers may be padded beyond what a checkpoint holds, and a
    tied head is loaded with the embedding.
    """
    problems = []
    tied = tied_head(model)
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        wanted = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        if layer is tied or not wanted or not info.can_load():
            continue
        if isinstance(layer, VocabParallelEmbedding):
            wanted = 1
        if info.load_numel < wanted:
            problems.append(f"layer {name} got {info.load_numel} of {wanted} elements")
    return problems


def tied_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """The output head if it shares the embedding's weights, else None."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    return getattr(model, "lm_head", None) if tied else None


def refresh_tied_head(model: torch.nn.Module, device: torch.device) -> None:
    """On the CPU the head computes with a packed copy made at start-up, which a reload of the embedding leaves stale."""
    head = tied_head(model)
    if head is None or device.type != "cpu":
        return
    head.weight = model.model.embed_tokens.weight
    dispatch_cpu_unquantized_gemm(head, remove_weight=False)
