"""A worker's end of the weight transfer on a CPU that computes with the weights as they lie, as a GPU does."""

from typing import Any

import torch
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

from grpo.rollout import vllm_private
from tests.attacked_receiver import AttackedReceiver


def unpacked(layer: Any, remove_weight: bool) -> None:
    """In the place of what packs a layer's weight for oneDNN."""
    layer.cpu_linear = torch.nn.functional.linear


for _module in (linear, utils, vocab_parallel_embedding, vllm_private):
    if hasattr(_module, "dispatch_cpu_unquantized_gemm"):
        _module.dispatch_cpu_unquantized_gemm = unpacked


class UnpackedReceiver(AttackedReceiver):
    packs = False
