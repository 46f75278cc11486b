"""The policy: a transformers causal LM that scores packed rows without padding and without the T x V logits.

Rows lie behind each other in a batch of one, a prompt of several rows once. Positions restart at each row, attention
stays inside the rows (`attention.py`), and the head runs on completion positions only (`head.py`). The result is that
of the rows one by one, gradients included.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import ConfigError
from grpo.trainer.attention import ATTENTION, Layout, attending, current_layout
from grpo.trainer.head import LogprobHead
from grpo.trainer.packing import PackedBatch
from grpo.trainer.shaping import shaping_of

WAY_OUT = "choose a model of a type in docs/models.md"
STATEFUL = re.compile(r"Conv1d|Mamba|SSM|Recurrent|DeltaNet|LightningAttention|Rwkv|LSTM|GRU")
"""Names of layers that carry something from one token to the next."""


class Policy(nn.Module):
    """Logprobs and entropies of completion tokens under the model at `temperature`."""

    def __init__(self, causal_lm: Any, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.entropy_gradient = False
        """Whether the entropy carries a gradient; else it is a statistic, and cheaper."""
        self.compiled = False
        """Whether the layers run under torch.compile."""

    def forward(self, batch: PackedBatch, temperature: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns fp32 `(logprobs_C, entropy_C)` in nats of the scored tokens; `temperature` replaces the policy's."""
        # Also in training: dropout, a router's jitter or skipped layers would make the ratio to the sampler noise.
        self.causal_lm.eval()
        head = self.causal_lm.get_output_embeddings()
        flash = head.weight.is_cuda and head.weight.dtype == torch.bfloat16
        layout = Layout(batch, flash)
        with attending(layout), running(self.compiled, len(batch.input_ids_T)):
            hidden = base_of(self.causal_lm)(
                input_ids=batch.input_ids_T[None],
                attention_mask=torch.ones_like(batch.input_ids_T)[None],  # no padding; rows are seen to in attention
                position_ids=batch.position_ids_T[None],
                use_cache=False,
            ).last_hidden_state
        layers = self.causal_lm.config.get_text_config().num_hidden_layers
        if layout.calls < layers:
            raise ConfigError(
                f"every layer must attend through the packed forward, but {type(self.causal_lm).__name__} has {layers} "
                f"layers, {layout.calls} with attention: the others may carry a state from row to row; {WAY_OUT}"
            )
        temperature = self.temperature if temperature is None else temperature
        hidden_TD = hidden[0] if torch.is_grad_enabled() else hidden[0].detach()
        logprobs_C, entropy_C = head(hidden_TD[batch.predict_C], batch.targets_C, temperature, self.entropy_gradient)
        return logprobs_C, entropy_C


@contextmanager
def running(compiled: bool, tokens: int) -> Iterator[None]:
    """Around the layers of a forward pass.

    What is compiled is one for all: without gradients it would be compiled again, and round otherwise than in training.
    """
    if not compiled:
        yield
        return
    with torch.enable_grad(), uncompiled(tokens == 1):
        yield


def uncompiled(single: bool) -> AbstractContextManager[Any]:
    """A single token, as fillers have, would be compiled by itself: its layers run as they are."""
    return torch.compiler.set_stance("force_eager") if single else nullcontext()


def load_policy(
    path: str,
    revision: str | None,
    dtype: torch.dtype,
    temperature: float,
    checkpointing: bool,
    fp32_head: bool = False,
) -> Policy:
    """Loads a Hugging Face folder or hub model. Raises ConfigError for models whose logits the head cannot make."""
    causal_lm = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype, trust_remote_code=False)
    return make_policy(causal_lm, temperature, checkpointing, fp32_head)


def make_policy(causal_lm: Any, temperature: float, checkpointing: bool = False, fp32_head: bool = False) -> Policy:
    """Wraps a model: own attention and head. Raises ConfigError for one that cannot have them."""
    name, head, base = type(causal_lm).__name__, causal_lm.get_output_embeddings(), base_of(causal_lm)
    between = [
        path
        for path, module in causal_lm.named_children()
        if module not in (head, base) and any(True for _ in module.parameters())
    ]
    if type(head) is not nn.Linear or base is causal_lm or between:
        raise ConfigError(
            f"the policy's logits must be hidden states times a matrix: {name} has {between or head}; {WAY_OUT}"
        )
    stateful = {type(module).__name__ for module in causal_lm.modules() if STATEFUL.search(type(module).__name__)}
    if stateful:
        raise ConfigError(
            f"packed rows must not see each other: {name} carries a state from token to token "
            f"({', '.join(sorted(stateful))}); {WAY_OUT}"
        )
    causal_lm.set_attn_implementation(ATTENTION)
    if causal_lm.config._attn_implementation != ATTENTION:
        raise ConfigError(
            f"attention must go through transformers' attention interface, but that of {name} does not; {WAY_OUT}"
        )
    causal_lm.set_output_embeddings(LogprobHead(head, shaping_of(causal_lm.config.get_text_config()), fp32_head))
    if checkpointing:
        recompute_layers(causal_lm)
    return Policy(causal_lm, temperature)


def base_of(causal_lm: Any) -> Any:
    """The model without its head, whatever its name."""
    if causal_lm.base_model is not causal_lm:
        return causal_lm.base_model
    inner = [module for module in causal_lm.children() if isinstance(module, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else causal_lm


def recompute_layers(causal_lm: Any) -> None:
    """Lets every layer keep its input alone and compute again in the backward pass.

    transformers does it in training mode only, and with that mode come dropout and other noise.
    """
    layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.gradient_checkpointing: {type(causal_lm).__name__} has no layers that can be computed again; "
            "set it to false"
        )
    kinds = {
        kind: type(kind.__name__, (kind,), {"__call__": _recomputed, "__module__": kind.__module__})
        for kind in dict.fromkeys(map(type, layers))
    }  # one for all layers of a kind: what is compiled for one of them is then that of all
    for layer in layers:
        layer.__class__ = kinds[type(layer)]


def _recomputed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for a layer's `__call__`, hooks included.

    Reentrant: only so are weights that ZeRO stage 3 has cut whole again when their gradient is made. All that can have
    a gradient must be positional for it.
    """
    layout, names = current_layout(), list(kwargs)
    single = layer._compiled_call_impl is not None and len(layout.select_T) == 1

    def call(*given: Any) -> Any:
        named = dict(zip(names, given[len(args) :], strict=True))
        with attending(layout), uncompiled(single):  # the backward pass has none of its own
            return nn.Module.__call__(layer, *given[: len(args)], **named)

    return checkpoint(call, *args, *kwargs.values(), use_reentrant=True, preserve_rng_state=False)
