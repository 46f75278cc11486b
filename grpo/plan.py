"""What a run will need, before anything is started: from the configuration and the model's config.json alone.

Sources: the states of mixed-precision AdamW and their sharding are from the ZeRO paper, arXiv 1910.02054, sections 3.1
and 5 (K = 12 bytes a parameter of fp32 copy and moments; our gradients are accumulated in fp32). Activations are an
estimate: what a Llama-like block keeps for its backward pass, 8h + 2kv + 4i numbers a token and layer.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.places import is_hub_model, unpinned
from grpo.wording import first_line

GIB = 2**30
FP32 = 4
HEAD_CHUNK = 1024  # completion positions whose logits the trainer holds at once, as in policy.py

# model_type -> (biases of q, k and v; norms of q and k), as transformers builds these models
FAMILIES = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


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

    @property
    def activations_per_layer(self) -> int:
        """Numbers that one layer keeps for the backward pass, per token."""
        return 8 * self.hidden + 2 * self.kv_width + 4 * self.intermediate


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes. `weights` to `head`: one trainer rank; `kv_tokens_*` are tokens that an engine's cache holds."""

    parameters: int
    sync_bytes: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    engine_weights: int
    kv_per_token: int
    kv_tokens_cpu: int
    kv_tokens_gpu: int
    rows: int
    tokens: int
    updates: int
    gpu_gib: float
    warnings: tuple[str, ...]

    @property
    def rank_bytes(self) -> int:
        return self.weights + self.reference + self.gradients + self.optimizer + self.activations + self.head


def plan(config: Config, gpu_gib: float = 80.0) -> Plan:
    """The plan for `config` on GPUs of `gpu_gib` GiB. Raises ConfigError if the model's config.json is out of reach."""
    shape, rollout, train = read_shape(config), config.rollout, config.train
    size = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    weights = shape.parameters * size
    stage, ranks = train.zero_stage, train.ranks
    # Without ZeRO, fp32 weights are their own master copy.
    adam = shape.parameters * (8 if size == FP32 and stage == 0 else 12)
    kv_per_token = 2 * shape.layers * shape.kv_width * size
    gpu_budget = int(gpu_gib * GIB * rollout.memory_utilization) * rollout.tensor_parallel
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    made = Plan(
        parameters=shape.parameters,
        sync_bytes=weights,
        weights=weights // (ranks if stage == 3 else 1),
        reference=weights if config.algorithm.kl_coef > 0 else 0,
        gradients=shape.parameters * FP32 // (ranks if stage >= 2 else 1),
        optimizer=adam // (ranks if stage >= 1 else 1),
        activations=activation_bytes(shape, train.tokens_per_micro_batch, size, train.gradient_checkpointing),
        head=head_bytes(shape, train.tokens_per_micro_batch),
        engine_weights=weights // rollout.tensor_parallel,
        kv_per_token=kv_per_token,
        kv_tokens_cpu=int(rollout.kv_cache_gib * GIB) // kv_per_token,
        kv_tokens_gpu=max(0, gpu_budget - weights) // kv_per_token,
        rows=rows,
        tokens=rows * config.model.max_length,
        updates=train.epochs * train.minibatches,
        gpu_gib=gpu_gib,
        warnings=(),
    )
    return _with_warnings(made, config)


def activation_bytes(shape: Shape, tokens: int, size: int, checkpointing: bool) -> int:
    """Activations of a packed forward pass; with checkpointing only each layer's input and one layer's inside."""
    if checkpointing:
        return tokens * size * (shape.layers * shape.hidden + shape.activations_per_layer)
    return tokens * size * shape.layers * shape.activations_per_layer


def head_bytes(shape: Shape, tokens: int) -> int:
    """One chunk's fp32 logits and log-softmax, and the head's fp32 gradient."""
    return 2 * min(tokens, HEAD_CHUNK) * shape.vocab * FP32 + shape.vocab * shape.hidden * FP32


def read_shape(config: Config) -> Shape:
    """Sizes from config.json of `model.path`: a local folder, else the hub's cache, else the hub."""
    path, raw = config.model.path, _read_model_config(config)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{path}: plan knows the model types {', '.join(FAMILIES)}, not {family!r}; train may still work"
        )
    qkv_bias, qk_norm = FAMILIES[family]
    bias = bool(raw.get("attention_bias", False))
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        shape = Shape(
            layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(raw["intermediate_size"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab=int(raw["vocab_size"]),
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


def _read_model_config(config: Config) -> dict[str, Any]:
    path, revision = config.model.path, config.model.revision
    file = Path(path) / "config.json"
    try:
        if not Path(path).is_dir():
            if revision is None and is_hub_model(path):
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


def _with_warnings(made: Plan, config: Config) -> Plan:
    found, longest = [], config.model.max_length
    on_cpu, on_gpu = config.cluster.device != "cuda", config.cluster.device != "cpu"
    if on_gpu and made.rank_bytes > made.gpu_gib * GIB:
        found.append(
            f"a trainer rank needs {gib(made.rank_bytes)} of a GPU's {made.gpu_gib:g} GiB: raise train.zero_stage or "
            "train.ranks, lower train.tokens_per_micro_batch or set train.gradient_checkpointing"
        )
    if on_gpu and made.kv_tokens_gpu < longest:
        found.append("an engine's GPU cannot hold one row beside the weights: raise rollout.tensor_parallel")
    if on_cpu and made.kv_tokens_cpu < longest:
        found.append(
            f"on a CPU, rollout.kv_cache_gib holds {made.kv_tokens_cpu} tokens, less than model.max_length: raise it"
        )
    return dataclasses.replace(made, warnings=tuple(found))


def table(made: Plan) -> Table:
    """The plan as people read it."""
    out = Table(title="plan", show_header=False, title_justify="left")
    out.add_column(style="bold")
    out.add_column(justify="right")
    out.add_row("parameters", f"{made.parameters:,}")
    out.add_row("bytes of a weight sync", f"{made.sync_bytes:,}", end_section=True)
    for name in ("weights", "reference", "gradients", "optimizer", "activations", "head"):
        out.add_row(f"trainer rank: {name}", gib(getattr(made, name)))
    out.add_row("trainer rank: sum", gib(made.rank_bytes), end_section=True)
    out.add_row("engine: weights on each GPU", gib(made.engine_weights))
    out.add_row("engine: KV cache of a token", f"{made.kv_per_token:,} B")
    out.add_row("engine: tokens that fit, CPU", f"{made.kv_tokens_cpu:,}")
    out.add_row(f"engine: tokens that fit, {made.gpu_gib:g} GiB GPU", f"{made.kv_tokens_gpu:,}", end_section=True)
    out.add_row("step: completions", f"{made.rows:,}")
    out.add_row("step: tokens, at most", f"{made.tokens:,}")
    out.add_row("step: optimizer updates", f"{made.updates:,}")
    return out


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
