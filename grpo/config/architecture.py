"""What a model's config.json says of it, before anything heavy is loaded: attention, length, or why it is refused.

The one reader of config.json: `plan`, `preflight`, trainer and engines ask here. Pure but for `read_model_config`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config.model_types import REFUSED, SUPPORTED
from grpo.config.paths import is_hub_model, unpinned
from grpo.config.schema import Config
from grpo.config.text import first_line, short
from grpo.errors import ConfigError

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
"""Names of the longest row."""
SCALED_ALREADY = ("default", "llama3", "longrope", "su", "yarn")
"""Kinds of RoPE whose `factor` is in the longest row already, as vLLM reads it; gemma3's is too."""
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention for the CPU has."""
UNSYNCED = ("gpt_oss", "mimo_v2_flash")
"""Architectures whose sinks or experts vLLM loads without the loaders that a reload of weights wraps."""
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What others ask of config.json. None: it is not said there."""

    model_type: str
    dtype: str | None
    """Of the weights in the files."""
    positions: int | None
    """Tokens of the longest row."""
    windows: tuple[int | None, ...]
    """The sliding window of each layer, None for a layer that sees all before it."""
    quantised: str | None
    """Method that the weights were quantised with."""
    head_dim: int | None


def read_model_config(config: Config) -> dict[str, Any]:
    """The config.json of `model.path`: of a folder, else of the hub's cache, else of the hub. Raises ConfigError."""
    path, revision = config.model.path, config.model.revision
    file = Path(path) / "config.json"
    try:
        if is_hub_model(path):
            if revision is None:
                raise ConfigError(unpinned("model.path", path))
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, "config.json", revision=revision))
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{path}: config.json cannot be read ({reason}); set model.path to a folder or a hub id"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}/config.json: must hold a JSON object; repair the file")
    return raw


def check_model_config(config: Config, device: str | None = None) -> Architecture:
    """Raises ConfigError if config.json says that the model cannot be trained or sampled from in this run."""
    raw = read_model_config(config)
    problem = refusal(raw, config, device)
    if problem:
        raise ConfigError(f"model.path = {config.model.path}: {problem}")
    return describe(raw)


def refusal(raw: Mapping[str, Any], config: Config, device: str | None = None) -> str | None:
    """Why this model cannot be used in this run on `device` (else cluster.device), with the way out, or None."""
    try:
        return next(_problems(raw, config.model.max_length, device or config.cluster.device), None)
    except (TypeError, ValueError, AttributeError) as error:
        return f"a value in config.json is not of its kind ({first_line(error)}); repair the file"


def describe(raw: Mapping[str, Any]) -> Architecture:
    """What config.json says of attention, length and weights. Raises ValueError or TypeError where it is nonsense."""
    text = _text(raw)
    dtype = text.get("dtype") or text.get("torch_dtype") or raw.get("dtype") or raw.get("torch_dtype")
    quantised = raw.get("quantization_config") or raw.get("compression_config") or text.get("quantization_config")
    method = (quantised.get("quant_method") or "unknown method") if isinstance(quantised, Mapping) else quantised
    return Architecture(
        model_type=str(raw.get("model_type") or ""),
        dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
        positions=_positions(text),
        windows=_windows(text),
        quantised=str(method) if method else None,
        head_dim=_head_dim(text),
    )


def _problems(raw: Mapping[str, Any], max_length: int, device: str) -> Iterator[str]:
    yield from _kind_problems(raw)
    found = describe(raw)
    if found.quantised:
        yield (
            f"its weights are quantised ({short(found.quantised)}), and training needs them as they were; choose the "
            "checkpoint in bfloat16 or float32"
        )
    if found.dtype is not None and found.dtype not in FLOATS:
        yield f"its weights are {short(found.dtype)}, and {', '.join(FLOATS)} can be read; convert the checkpoint"
    yield from _rope_problems(_text(raw), max_length)
    if found.positions is not None and found.positions < max_length:
        yield (
            f"model.max_length = {max_length} must fit the model's positions, which end at "
            f"{found.positions}; lower model.max_length"
        )
    if device == "cpu" and found.head_dim not in (None, *CPU_HEADS):
        yield (
            f"its attention heads have {found.head_dim} numbers, and vLLM on the CPU has "
            f"{', '.join(map(str, CPU_HEADS))}; choose another model or cluster.device: cuda"
        )


def _kind_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """What stands against the architecture itself."""
    out = "choose a model of a type in docs/models.md"
    name = raw.get("model_type")
    if not isinstance(name, str) or not name:
        yield f"config.json names no model_type; is it a whole Hugging Face folder? If so, {out}"
        return
    if name in REFUSED:
        yield f"its architecture {name} {REFUSED[name]}; {out}"
    elif name in UNSYNCED:
        yield f"its architecture {name} takes no new weights while vLLM runs: its loader writes past a reload; {out}"
    elif name not in SUPPORTED and raw.get("auto_map"):
        yield f"its architecture {short(name)} is code in the checkpoint (auto_map), which is never run; {out}"
    elif name not in SUPPORTED:
        yield f"its architecture {short(name)} is not among those whose packed forward is proven; {out}"
    if name == "llama4_text" and raw.get("attn_temperature_tuning", True):
        yield f"its architecture {name} scales queries by place in the whole batch (attn_temperature_tuning); {out}"
    classes = [str(each) for each in raw.get("architectures") or ()]
    if classes and not any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in classes):
        yield f"it is a {short(', '.join(classes))}, and a policy is a causal language model; {out}"
    if raw.get("is_encoder_decoder") or raw.get("add_cross_attention"):
        yield f"it is an encoder-decoder or has cross attention; {out}"
    if raw.get("is_causal") is False or raw.get("use_bidirectional_attention"):
        yield f"its attention sees both ways (is_causal: false or use_bidirectional_attention); {out}"
    if raw.get("alibi") or raw.get("position_embedding_type") in ("alibi", "relative_key", "relative_key_query"):
        yield f"its architecture {name} {REFUSED['bloom']}; {out}"


def _rope_problems(text: Mapping[str, Any], max_length: int) -> Iterator[str]:
    """RoPE whose angles depend on how long a row becomes, which sampler and trainer compute differently."""
    for rope in _ropes(text):
        kind = rope.get("rope_type") or rope.get("type")
        if kind in ("dynamic", "dynamic_alpha"):
            yield "its RoPE is dynamic: a token's angles depend on how long its row becomes; choose another model"
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        original = original or text.get("max_position_embeddings")
        if kind in ("longrope", "su") and original and int(original) < max_length:
            yield (
                f"its RoPE ({kind}) changes for rows longer than {original} tokens, but model.max_length = "
                f"{max_length}; lower model.max_length to {original}"
            )


def _text(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    text = raw.get("text_config")
    return text if isinstance(text, Mapping) else raw


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The RoPE settings: one, or one for each kind of layer."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    return nested or [rope]


def _positions(text: Mapping[str, Any]) -> int | None:
    lengths = [int(text[name]) for name in LENGTHS if text.get(name)]
    if text.get("model_max_length"):
        lengths = [int(text["model_max_length"])]
    factors = [
        float(rope.get("factor") or 1.0)
        for rope in _ropes(text)
        if (rope.get("rope_type") or rope.get("type") or "default") not in SCALED_ALREADY
    ]
    stretched = max(factors, default=1.0) if "gemma3" not in str(text.get("model_type")) else 1.0
    return int(min(lengths) * stretched) if lengths else None


def _windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    """By `layer_types`; without them one window for all layers."""
    count = int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
    window = text.get("sliding_window")
    if window is None or text.get("use_sliding_window") is False:
        return (None,) * count
    kinds = text.get("layer_types")
    if kinds:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    return (int(window),) * count


def _head_dim(text: Mapping[str, Any]) -> int | None:
    """None for MLA, whose cache has sizes of its own."""
    heads, hidden = text.get("num_attention_heads") or text.get("n_head"), text.get("hidden_size") or text.get("n_embd")
    if text.get("kv_lora_rank"):
        return None
    if text.get("head_dim"):
        return int(text["head_dim"])
    return int(hidden) // int(heads) if heads and hidden else None
