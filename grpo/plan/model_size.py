"""Sizes of a model, from its config.json alone."""

from dataclasses import dataclass
from typing import Any

from grpo.config import Config, Lora
from grpo.config.architecture import read_model_config, refusal
from grpo.errors import ConfigError

# model_type -> (biases of q, k and v; norms of q and k), as transformers builds these models
MODEL_TYPES = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of one token, and in its values."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Numbers in the model; a tied head counts once."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_width
        attention = 2 * h * q + 2 * h * kv + self.qkv_bias * (q + 2 * kv) + self.out_bias * h
        mlp = 3 * h * i + self.mlp_bias * (2 * i + h)
        norms = 2 * h + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab * h * (1 if self.tied else 2)
        return self.layers * (attention + mlp + norms) + embeddings + h

    def adapter_parameters(self, lora: Lora) -> int:
        """Numbers in an adapter of this shape. Raises ConfigError for a target that is no layer of it."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_width
        attention = {"q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h}
        block = {f"self_attn.{name}": size for name, size in attention.items()}
        block |= {f"mlp.{name}": h + i for name in ("gate_proj", "up_proj", "down_proj")}
        layers = {f"model.layers.{n}.{name}": size for n in range(self.layers) for name, size in block.items()}
        for target in () if lora.targets == "all" else lora.targets:
            if not any(f".{layer}".endswith(f".{target}") for layer in layers):
                raise ConfigError(
                    f"train.lora.targets: plan knows the linear layers {', '.join(block)}, of layers.0 to "
                    f"layers.{self.layers - 1}, but not {target}; name some of these, or all"
                )
        return lora.rank * sum(size for layer, size in layers.items() if lora.covers(layer))

    @property
    def activations_per_layer(self) -> int:
        """Numbers that one layer keeps for the backward pass, per token."""
        return 8 * self.hidden + 2 * self.kv_width + 4 * self.intermediate


def read_shape(config: Config) -> Shape:
    """Sizes from config.json of `model.path`. Raises ConfigError also for a model that the run would refuse."""
    path, raw = config.model.path, read_model_config(config)
    if problem := refusal(raw, config):
        raise ConfigError(f"model.path = {path}: {problem}")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{path}: plan knows the model types {', '.join(MODEL_TYPES)}, not {model_type!r}; train may still work"
        )
    qkv_bias, qk_norm = MODEL_TYPES[model_type]
    bias = bool(raw.get("attention_bias", False))
    try:
        heads, hidden = _size(raw, "num_attention_heads"), _size(raw, "hidden_size")
        shape = Shape(
            layers=_size(raw, "num_hidden_layers"),
            hidden=hidden,
            intermediate=_size(raw, "intermediate_size"),
            heads=heads,
            kv_heads=_size(raw, "num_key_value_heads", heads),
            head_dim=_size(raw, "head_dim", hidden // heads),
            vocab=_size(raw, "vocab_size"),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias or bias,
            out_bias=bias and not qkv_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=qk_norm,
        )
    except KeyError as error:
        raise ConfigError(f"{path}/config.json: {error} is missing; is this a whole Hugging Face folder?") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}/config.json: a size is not a positive integer ({error}); repair the file") from None
    if min(shape.layers, hidden, shape.intermediate, heads, shape.kv_heads, shape.head_dim, shape.vocab) < 1:
        raise ConfigError(f"{path}/config.json: a size is below 1; repair the file")
    return shape


def _size(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A size of the file; KeyError where it is missing and has no default, TypeError or ValueError for no number."""
    value = raw[key] if default is None else raw.get(key) or default
    if not isinstance(value, int | float | str):
        raise TypeError(f"{key} is {type(value).__name__}")
    return int(value)
