"""What runs inside every vLLM worker: takes the policy's weights and says what it took.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls it by name (`collective_rpc`), with plain data.
The tensors go through vLLM's layerwise reload, which also fuses, shards and packs them as at start-up.
"""

import logging
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.utils.nccl import unpinned_nccl_env

from grpo.config import Config
from grpo.types import TensorRecord
from grpo.weights import Transport, make_transport

# It warns of every layer without weights of its own, in healthy reloads too; `unloaded` tells those from the others.
logging.getLogger(layerwise.__name__).setLevel(logging.ERROR)

PlainRecord = tuple[str, tuple[int, ...], str, str]
"""Name, shape, dtype, digest: what crosses the border between vLLM's processes."""


class Receiver:
    """A worker's end of the weight transfer. The attributes without a value are the worker's own."""

    rank: int
    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    transport: Transport | None = None

    def ping(self) -> None:
        """Does nothing: its answer shows that the worker still takes calls between two steps."""

    def join_transfer(self, config: str, url: str, rank_offset: int, world_size: int) -> None:
        """Joins a transfer group as rank `rank_offset` plus this worker's rank, leaving the one before.

        `config` is the run's, as JSON.
        """
        parsed = Config.model_validate_json(config)
        if self.transport is not None:
            self.transport.close()
            self.transport = None
        with (
            unpinned_nccl_env()
        ):  # NCCL settings that vLLM makes for its own groups would make the trainer wait for ever
            self.transport = make_transport(parsed, self.device.type, url, rank_offset + self.rank, world_size)

    def receive_tensors(self, expected: list[list[Any]]) -> tuple[list[PlainRecord], list[str]]:
        """Loads what the trainer sends. `expected` is [[name, shape, dtype], ...] as the trainer announced it.

        Returns what arrived, in order, and what is wrong with it; with anything wrong the model must not be used. Reads
        to the end of the stream whatever is wrong, so that no other rank waits for this one. If it cannot, it leaves
        the group and raises, and the model is in pieces.
        """
        assert self.transport is not None, "receive_tensors before join_transfer"
        missing = {name: (tuple(shape), dtype) for name, shape, dtype in expected}
        model = self.model_runner.get_model()
        received: list[PlainRecord] = []
        problems: list[str] = []
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            layerwise.initialize_layerwise_reload(model)
            try:
                for record, tensor in self.transport.receive():
                    received.append((record.name, record.shape, record.dtype, record.digest))
                    if missing.pop(record.name, None) == (record.shape, record.dtype):
                        problems += load(model, record, tensor)
                    else:
                        problems.append(f"{record.name} {list(record.shape)} {record.dtype} was not announced")
                problems += [f"{name} was announced and not sent" for name in missing] + unloaded(model)
            except BaseException:
                self.transport.close()
                raise
            finally:
                finish(model, self.model_config, self.device)
        return received, problems


def load(model: Any, record: TensorRecord, tensor: torch.Tensor) -> list[str]:
    """Hands one tensor to vLLM's loader; a problem if the model does not claim it."""
    try:
        claimed = model.load_weights([(record.name, tensor)])
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        return [f"{record.name} cannot be loaded ({type(error).__name__}: {error})"]
    return [] if claimed else [f"{record.name} is not claimed by the model"]


def unloaded(model: Any) -> list[str]:
    """Layers that did not get all their weights, asked for before the reload is finished.

    vLLM fuses checkpoint tensors (q, k and v into qkv), so names cannot be counted; each layer counts its elements, and
    one that has them all is finished and forgotten. A vocabulary layer may be padded beyond what a checkpoint holds.
    """
    problems = []
    for name, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        wanted = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        if not wanted or not info.can_load() or layer is tied_head(model):
            continue
        if info.load_numel < (1 if isinstance(layer, VocabParallelEmbedding) else wanted):
            problems.append(f"layer {name} got {info.load_numel} of {wanted} elements")
    return problems


def finish(model: Any, model_config: Any, device: torch.device) -> None:
    """Ends the reload and waits until the device has done it."""
    layerwise.finalize_layerwise_processing(model, model_config)
    head = tied_head(model)
    if head is not None and device.type == "cpu":
        # The head computes with a packed copy made at start-up, which a reload of the embedding leaves stale.
        head.weight = model.model.embed_tokens.weight
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tied_head(model: Any) -> Any:
    """The output head if it shares the embedding's weights, else None."""
    return getattr(model, "lm_head", None) if getattr(model.config, "tie_word_embeddings", False) else None
