"""Tiny random models of every supported architecture, and their packed forward against the plain one of transformers.

`python -m tests.trainer.architectures` writes the table of docs/models.md.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.model_types import REFUSED, SUPPORTED
from grpo.trainer.model import make_policy
from grpo.trainer.packing import pack
from grpo.types import Sample
from tests.models import VOCABULARY, random_samples

TEMPERATURE = 0.7
WINDOW = 6
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 24,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "dff": 48,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "kv_channels": 8,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "logits_scaling": 4.0,
    "logit_scale": 0.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 2.0,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "no_rope_layers": [1, 0, 1],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "router_jitter_noise": 0.3,
    "input_jitter_noise": 0.3,
    "attention_dropout": 0.3,
    "resid_pdrop": 0.3,
    "embd_pdrop": 0.3,
    "attn_pdrop": 0.3,
    "dropout": 0.3,
    "residual_dropout": 0.3,
    "hidden_dropout": 0.3,
    "layerdrop": 0.3,
}
"""Set wherever a config has the name: all that could be random in training is on."""

MLA = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
FULL = ["full_attention"] * 3
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": None, "num_key_value_heads": 4} for name in MLA},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "diffllama": {"attention_dropout": 0.0},
    "gemma4_text": {"initializer_range": 0.1},  # else plain float32 is as far from float64
    "jetmoe": {"intermediate_size": 24},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 5,
        "attn_temperature_tuning": False,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "longcat_flash": {
        "head_dim": 4,
        "num_key_value_heads": 4,
        "num_layers": 2,
        "num_hidden_layers": None,
        "zero_expert_num": 2,
    },
    "minicpm3": {"head_dim": None, "num_key_value_heads": 4, "dim_model_base": 16},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.3,
        }
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama, RoPE {name}": ("llama", {"rope_parameters": {"rope_theta": 10000.0} | r}) for name, r in ROPES.items()},
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "phi3, longrope, short rows": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.5] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral, window longer than the rows": ("mistral", {"sliding_window": 64}),
    "gemma2, window longer than the rows": ("gemma2", {"sliding_window": 64}),
    "gpt_oss, window longer than the rows": ("gpt_oss", {"sliding_window": 64}),
    "gpt_oss, a window of one token": ("gpt_oss", {"sliding_window": 1}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False, "layer_types": FULL}),
    "gpt2, tied": ("gpt2", {"tie_word_embeddings": True}),
}
"""What else a type can be."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in sorted(SUPPORTED)} | VARIANTS


def tiny(name: str, **changes: Any) -> Any:
    """A random model in float32 with plain attention, whose weights are large enough that every part tells."""
    known = AutoConfig.for_model(name)
    names = set(known.to_dict()) | set(getattr(known, "attribute_map", {}))
    settings = {key: value for key, value in SIZES.items() if key in names} | CHANGES.get(name, {}) | changes
    config = AutoConfig.for_model(name, **{key: value for key, value in settings.items() if value is not None})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() == 1 or "bias" in path or "sink" in path:
                weight.add_(torch.randn(weight.shape) * 0.2)
            elif weight.std() < 0.05:
                weight.copy_(torch.randn(weight.shape) * 0.2)
    return model


class Difference(NamedTuple):
    """Of the packed forward from the plain one: the largest of a logprob, and 1 - cosine of the whole gradient."""

    value: float
    gradient: float


def plain_logprobs(model: Any, samples: Sequence[Sample], device: str = "cpu") -> torch.Tensor:
    """Each row by itself, as transformers computes it."""
    found = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.output_ids], device=device)
        log_probs_CV = torch.log_softmax(model(ids).logits[0].float() / TEMPERATURE, -1)[
            len(sample.prompt_ids) - 1 : -1
        ]
        found.append(log_probs_CV.gather(1, ids[0, len(sample.prompt_ids) :, None])[:, 0])
    return torch.cat(found)


def gradients(model: Any) -> torch.Tensor:
    """All of them behind each other, with zeros for what has none; they are forgotten then."""
    flat = [torch.zeros_like(w) if w.grad is None else w.grad for w in model.parameters() if w.requires_grad]
    model.zero_grad()
    return torch.cat([gradient.flatten() for gradient in flat]).double()


def compare(model: Any, samples: Sequence[Sample], device: str = "cpu", checkpointing: bool = False) -> Difference:
    """Several rows at once, some of one prompt, against each row alone."""
    expected_C = plain_logprobs(model, samples, device)
    weights_C = torch.randn(len(expected_C), generator=torch.Generator().manual_seed(1)).to(device)
    (expected_C * weights_C).sum().backward()
    expected = gradients(model)
    policy = make_policy(model, TEMPERATURE, checkpointing).train()
    logprobs_C, _ = policy(pack(samples).to(torch.device(device)))
    (logprobs_C * weights_C).sum().backward()
    cosine = torch.cosine_similarity(expected, gradients(model), dim=0)
    return Difference((logprobs_C - expected_C).abs().max().item(), 1 - cosine.item())


def measure(case: str) -> Difference:
    """Of one row of the table."""
    name, changes = CASES[case]
    return compare(tiny(name, **changes), random_samples(7))


def table() -> str:
    """The rows of docs/models.md: what is supported, and what is not."""
    lines = ["| model_type | logprobs, nats | gradient, 1 - cosine |", "|---|---|---|"]
    for case in CASES:
        found = measure(case)
        lines.append(f"| {case} | {found.value:.0e} | {max(found.gradient, 0.0):.0e} |")
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    lines += ["", "## Refused", "| its architecture ... | model_type |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?<=## Supported\n).*", lambda _: table() + "\n", page, flags=re.DOTALL))
