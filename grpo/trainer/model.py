"""The policy: a transformers causal LM that scores packed rows without padding and without the T x V logits.

Rows lie behind each other in a batch of one, a prompt of several rows once. Positions restart at each row, attention
stays inside the rows (`attention.py`), and the head runs on completion positions only (`head.py`). The result is that of
the rows one by one, gradients included.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from grpo.errors import ConfigError
from grpo.trainer.attention import ATTENTION, make_layout
from grpo.trainer.head import LogprobHead
from grpo.trainer.packing import PackedBatch


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
