"""The policy: a transformers causal LM that scores packed rows without padding and without the T x V logits.

Rows lie behind each other in a batch of one, a prompt of several rows once. Positions restart at each row and a
registered attention function lays the rows out, so no T x T mask is built: linear layers see each token once, attention
sees whole rows. The result is that of the rows one by one, gradients included. The head runs on completion positions
only, in chunks, in a function that recomputes the logits in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoModelForCausalLM

from grpo.errors import ConfigError
from grpo.trainer.packing import PackedBatch

ATTENTION = "grpo_packed"
DENSE_LENGTH = 512
"""Longest row whose attention scores are held as a whole (bf16 on the CPU)."""
CHUNK = 1024
"""Completion positions whose logits exist at once."""


class Policy(nn.Module):
    """Logprobs and entropies of completion tokens under the model at `temperature`."""

    def __init__(self, causal_lm: Any, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.entropy_gradient = False
        """Whether the entropy carries a gradient; else it is a statistic, and cheaper."""

    def forward(self, batch: PackedBatch, temperature: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns fp32 `(logprobs_C, entropy_C)` in nats of the scored tokens; `temperature` replaces the policy's."""
        weight = self.causal_lm.lm_head.weight
        hidden = self.causal_lm.base_model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            layout=make_layout(batch, flash=weight.is_cuda and weight.dtype == torch.bfloat16),
        ).last_hidden_state
        temperature = self.temperature if temperature is None else temperature
        logprobs_C, entropy_C = self.causal_lm.lm_head(
            hidden[0, batch.predict_C], batch.targets_C, temperature, self.entropy_gradient
        )
        return logprobs_C, entropy_C


def load_policy(path: str, revision: str | None, dtype: torch.dtype, temperature: float, checkpointing: bool) -> Policy:
    """Loads a Hugging Face folder or hub model. Raises ConfigError for models whose logits the head cannot make."""
    causal_lm = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype, trust_remote_code=False)
    return make_policy(causal_lm, temperature, checkpointing)


def make_policy(causal_lm: Any, temperature: float, checkpointing: bool = False) -> Policy:
    """Wraps a model: own attention and head, no dropout (the sampler has none, so the ratio would be noise)."""
    _check_supported(causal_lm)
    causal_lm.set_attn_implementation(ATTENTION)
    causal_lm.set_output_embeddings(LogprobHead(causal_lm.get_output_embeddings()))
    for module in causal_lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(causal_lm, temperature)


def _check_supported(causal_lm: Any) -> None:
    config, head = causal_lm.config.get_text_config(), causal_lm.get_output_embeddings()
    scaling = {
        name: getattr(config, name)
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
        if getattr(config, name, None) not in (None, 1, 1.0)
    }
    if scaling or type(head) is not nn.Linear or head.bias is not None or not hasattr(causal_lm, "lm_head"):
        raise ConfigError(
            f"the policy's logits must be hidden states times lm_head.weight: {type(causal_lm).__name__} has "
            f"{scaling or head}; choose a Llama- or Qwen-like model in model.path"
        )


class LogprobHead(nn.Linear):
    """lm_head that returns logprobs of given tokens, not logits. It shares the weight of the layer it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(  # type: ignore[override]
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `(logprobs_C, entropy_C)` of `targets_C` under softmax(hidden @ weight.T / temperature)."""
        apply: Any = _Logprobs.apply
        logprobs_C, entropy_C = apply(hidden_CD, self.weight, targets_C, temperature, entropy_gradient)
        return logprobs_C, entropy_C


class _Logprobs(torch.autograd.Function):
    """Log-softmax at the targets, chunk by chunk: one chunk's fp32 logits exist at a time, in both directions.

    With p = softmax(logits / t) and H its entropy: d logprob[c] / d logits[c] = (onehot(target) - p) / t and
    d H[c] / d logits[c] = -p (log p + H) / t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_C: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        logprobs, entropies = [], []
        for hidden, targets in _chunks(hidden_CD, targets_C):
            log_probs_cV = _log_softmax(hidden, weight_VD, temperature)
            logprobs.append(log_probs_cV.gather(1, targets[:, None])[:, 0])
            entropies.append(-(log_probs_cV.exp() * log_probs_cV).sum(1))
        entropy_C = torch.cat(entropies)
        ctx.save_for_backward(hidden_CD, weight_VD, targets_C, entropy_C)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_C)
        return torch.cat(logprobs), entropy_C

    @staticmethod
    def backward(ctx: Any, grad_C: torch.Tensor, grad_entropy_C: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_CD, weight_VD, targets_C, entropy_C = ctx.saved_tensors
        grad_hidden_CD = torch.empty_like(hidden_CD)
        # fp32 whatever the weight's precision: many chunks add up here
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        entropies_CC = (entropy_C, grad_entropy_C) if ctx.entropy_gradient else (grad_C, grad_C)
        tensors = _chunks(hidden_CD, grad_hidden_CD, targets_C, grad_C, *entropies_CC)
        for hidden, grad_hidden, targets, grad, entropy, grad_entropy in tensors:
            log_probs_cV = _log_softmax(hidden, weight_VD, ctx.temperature)
            bonus_cV = None
            if ctx.entropy_gradient:
                bonus_cV = (log_probs_cV + entropy[:, None]).mul_(log_probs_cV.exp()).mul_(-grad_entropy[:, None])
            grad_logits_cV = log_probs_cV.exp_().mul_(-grad[:, None])
            grad_logits_cV.scatter_add_(1, targets[:, None], grad[:, None])
            if bonus_cV is not None:
                grad_logits_cV += bonus_cV
            grad_logits = grad_logits_cV.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden)
            grad_weight_VD += grad_logits.T @ hidden
        return grad_hidden_CD, grad_weight_VD.to(weight_VD.dtype), None, None, None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of CHUNK positions of every tensor."""
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


def _log_softmax(hidden_cD: torch.Tensor, weight_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_cV = F.linear(hidden_cD, weight_VD).float()
    return F.log_softmax(logits_cV if temperature == 1.0 else logits_cV / temperature, dim=1)


@dataclass(frozen=True, slots=True)
class Layout:
    """How attention lays packed tokens out as whole rows and takes its results back.

    `gather_E` are the tokens of the rows behind each other (`flash`) or in a [rows, max_length] grid, right-padded with
    any token; `select_T` is where each packed token stands there.
    """

    flash: bool
    cu_seqlens_R1: torch.Tensor
    max_length: int
    gather_E: torch.Tensor
    select_T: torch.Tensor


def make_layout(batch: PackedBatch, flash: bool) -> Layout:
    """The varlen kernel takes rows behind each other, SDPA a grid."""
    bounds, length = batch.cu_seqlens_R1, batch.max_length
    if flash:
        return Layout(True, bounds, length, batch.expand_E, batch.select_T)
    starts_R1, ends_R1 = bounds[:-1, None].long(), bounds[1:, None].long()
    places_RL = starts_R1 + torch.arange(length, device=bounds.device)
    inside_RL = places_RL < ends_R1
    gather_E = torch.where(inside_RL, batch.expand_E[places_RL.clamp(max=len(batch.expand_E) - 1)], 0).flatten()
    select_T = inside_RL.flatten().nonzero()[:, 0][batch.select_T]
    return Layout(False, bounds, length, gather_E, select_T)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    A shared prompt's keys and values are seen by all its rows; its own output is computed in each and taken from one.
    In the grid, causal attention never looks at the padding behind a row, and what the padding computes is dropped, so
    this is exact.
    """
    length = layout.max_length
    if sliding_window is not None and length > sliding_window:
        raise ConfigError(
            f"rows must fit the model's sliding window: {length} tokens > {sliding_window}; lower model.max_length"
        )
    heads = query.shape[1]
    query, key, value = (t[0].transpose(0, 1).index_select(0, layout.gather_E) for t in (query, key, value))
    if layout.flash:
        bounds = {"cu_seq_q": layout.cu_seqlens_R1, "cu_seq_k": layout.cu_seqlens_R1, "max_q": length, "max_k": length}
        # repeated here: how the kernel is told of grouped heads differs between torch releases
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
        attend: Any = varlen_attn
        output = attend(query, key, value, **bounds, scale=scaling, window_size=(-1, 0))
    else:
        grouped = heads != key.shape[1]
        query, key, value = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (query, key, value))
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and length <= DENSE_LENGTH:
            output = dense_attention(query, key, value, scaling)
        else:
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        output = output.transpose(1, 2).flatten(0, 1)
    return output.index_select(0, layout.select_T)[None], None


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of R rows by matrix products: [R, heads, L, head_dim] in and out.

    With its backward pass 3 times as fast as torch's fused bf16 kernel for the CPU, but it holds the L x L scores.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    future_LL = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future_LL.repeat(groups, 1),
        query.reshape(-1, groups * length, size),
        key.reshape(-1, length, size).transpose(1, 2),
        alpha=scaling or size**-0.5,
    )
    return (scores.softmax(-1) @ value.reshape(-1, length, size)).view(rows, heads, length, size)


AttentionInterface.register(ATTENTION, packed_attention)
