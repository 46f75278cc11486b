"""What the GPUs could do at most, and how much of it a step reaches: section by section the formulas that are plotted.

N parameters, L layers, q = heads x head size, s = mean length of a row (prompt and completion), B sequences on a GPU.
- training: 6 N + 6 L q s FLOPs a token (causal attention), against the matrix peak;
- sampling: a step of decoding reads all weights and B contexts, or computes 2 N B + 4 L q B context FLOPs, whichever
  takes longer; context = prompt + half the completion;
- weights: their bytes over one direction of the link.
"""

from dataclasses import dataclass

from benchmarks.gpu.work import SHAPES
from grpo.plan.gpus import Gpu
from grpo.plan.model_size import Shape

BF16 = 2


def shape_of(name: str) -> Shape:
    """The sizes of `work.SHAPES`, as `grpo plan` knows them."""
    sizes = SHAPES[name]
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    return Shape(
        layers=sizes["num_hidden_layers"],
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
        heads=heads,
        kv_heads=sizes["num_key_value_heads"],
        head_dim=hidden // heads,
        vocab=sizes["vocab_size"],
        tied=True,
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


@dataclass(frozen=True)
class Limits:
    """Tokens a second of all GPUs that train and of all that sample, seconds of a sync and of a step; none is lower."""

    train_tokens: float
    sample_tokens: float
    sync: float
    step: float


def flops_per_token(shape: Shape, row: float) -> float:
    """Forward and backward, of one token in rows of that mean length."""
    return 6.0 * shape.parameters + 6.0 * shape.layers * shape.heads * shape.head_dim * row


def limits_of(
    shape: Shape, gpu: Gpu, rows: int, prompt: float, completion: float, engines: int, ranks: int, turns: bool = False
) -> Limits:
    """Of a step of so many rows on so many GPUs for engines and for ranks, which overlap or take turns."""
    width, batch = shape.heads * shape.head_dim, rows / engines
    context = prompt + completion / 2
    read = (BF16 * shape.parameters + batch * context * 2 * shape.layers * shape.kv_width * BF16) / gpu.bandwidth
    computed = batch * (2 * shape.parameters + 4 * shape.layers * width * context) / gpu.bf16
    sample = engines * batch / max(read, computed)
    train = ranks * gpu.bf16 / flops_per_token(shape, prompt + completion)
    parts = rows * completion / sample, rows * (prompt + completion) / train
    return Limits(train, sample, BF16 * shape.parameters / gpu.link, sum(parts) if turns else max(parts))
