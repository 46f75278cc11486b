"""A low-rank adapter on a model's linear layers, whose product with a row is that of the merged weights, bit for bit.

Engines hold W + s B A, rounded to the model's precision. PEFT's own forward adds s B (A x) to W x, which rounds
otherwise: in bfloat16 a change below half a step of W reaches no engine, but its trainer would learn from it already.
So the layers here compute with the merged weights too, made anew for each pass out of the frozen W: trainer and engine
have the same policy. The gradients of A and B are those of LoRA, with two thin products and none of W's size.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from grpo.config.lora import Lora
from grpo.errors import ConfigError
from grpo.trainer.model import Policy
from grpo.trainer.row_logprobs import Scores

NAME = "default"
"""PEFT's name of an adapter that has none; it stands in no file."""
INSIDE = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")
"""Names of modules within a layer that has an adapter."""


def merge(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + scaling B A: computed in fp32, rounded once."""
    return torch.addmm(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scaling).to(weight_OI.dtype)


class _Merged(torch.autograd.Function):
    """x (W + s B A)^T + bias; nothing as large as W is kept for the backward pass, and W has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR)
        ctx.scaling = scaling
        return F.linear(x, merge(weight_OI, a_RI, b_OR, scaling), bias_O)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_x = grad @ merge(weight_OI, a_RI, b_OR, ctx.scaling) if ctx.needs_input_grad[0] else None
        grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_b_OR = grad_TO.T @ (x_TI @ a_RI.T) * ctx.scaling
        grad_a_RI = (grad_TO @ b_OR).T @ x_TI * ctx.scaling
        return grad_x, None, None, grad_a_RI, grad_b_OR, None


@dataclass(frozen=True, slots=True)
class Adapted:
    """One linear layer with its adapter."""

    name: str
    """Dotted name of the layer in the model."""
    layer: Any

    @property
    def a_RI(self) -> nn.Parameter:
        """First of the two factors: from the layer's input."""
        factor: nn.Parameter = self.layer.lora_A[NAME].weight
        return factor

    @property
    def b_OR(self) -> nn.Parameter:
        """Second of the two factors: to the layer's output. Zero at the start."""
        factor: nn.Parameter = self.layer.lora_B[NAME].weight
        return factor

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return float(self.layer.scaling[NAME])

    @property
    def reach(self) -> float:
        """How far each number of W moves, about, when all of B's move by 1: A is as large as PEFT makes it."""
        rank, inputs = getattr(self.a_RI, "ds_shape", self.a_RI.shape)  # at stage 3 only a part of it is here
        return self.scaling * math.sqrt(rank / (3.0 * inputs))

    @property
    def frozen(self) -> nn.Parameter:
        """W, which nothing moves."""
        weight: nn.Parameter = self.layer.base_layer.weight
        return weight

    def merged(self) -> torch.Tensor:
        """What is sampled from."""
        return merge(self.frozen.detach(), self.a_RI.detach(), self.b_OR.detach(), self.scaling)

    def size_of_b(self) -> float:
        """Root mean square that B needs for the change to be as large as W."""
        size_a, size_w = (float(each.detach().float().square().mean().sqrt()) for each in (self.a_RI, self.frozen))
        return size_w / max(self.scaling * math.sqrt(len(self.a_RI)) * size_a, 1e-12)


def add_adapter(causal_lm: Any, lora: Lora, seed: int, checkpointing: bool) -> None:
    """Lets PEFT put an adapter on the layers that `lora` names; nothing else has a gradient afterwards.

    The same seed makes the same adapter. Raises ConfigError where a name is that of no linear layer.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear

    config = peft_config(lora, target_names(causal_lm, lora))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, causal_lm, NAME)
    kind = type("AdaptedLinear", (Linear,), {"forward": _forward, "adapter_off": False})
    dtype = next(causal_lm.parameters()).dtype
    causal_lm.requires_grad_(False)
    for one in adapted_layers(causal_lm).values():
        one.layer.__class__ = kind
        for factor in (one.a_RI, one.b_OR):
            factor.data = factor.data.to(dtype)
            factor.requires_grad_(True)
    if checkpointing:  # a layer that is computed again needs an input with a gradient, or has none itself
        causal_lm.get_input_embeddings().register_forward_hook(lambda _module, _input, output: output.requires_grad_())


def peft_config(lora: Lora, targets: Sequence[str]) -> Any:
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    alpha: Any = lora.alpha  # PEFT takes any number, and says int
    return LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")


def target_names(causal_lm: Any, lora: Lora) -> list[str]:
    """Names of layers by which PEFT finds those that are meant, and no other. Raises ConfigError."""
    head = causal_lm.get_output_embeddings()
    modules = {name: getattr(module, "base_layer", module) for name, module in causal_lm.named_modules() if name}
    modules = {name: module for name, module in modules.items() if not INSIDE.search(name)}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear and module is not head]
    if lora.targets == "all":
        found = sorted({name.rpartition(".")[2] for name in linear})
        if not found:
            raise ConfigError(
                f"train.lora: an adapter needs linear layers, but {type(causal_lm).__name__} has none; leave it out"
            )
        odd = [name for name in modules if name.rpartition(".")[2] in found and name not in linear]
        return linear if odd else found
    for target in lora.targets:
        meant = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not meant or not set(meant) <= set(linear):
            what = f"those of {type(modules[meant[0]]).__name__}" if meant else "no layers"
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"train.lora.targets: must name linear layers below the head, but {target} names {what}; choose of "
                f"{known or 'another model'}"
            )
    return list(lora.targets)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Stands for the forward of PEFT's layer."""
    base = self.base_layer
    if self.adapter_off:
        return F.linear(x, base.weight, base.bias)
    apply: Callable[..., torch.Tensor] = _Merged.apply
    factors = self.lora_A[NAME].weight, self.lora_B[NAME].weight
    return apply(x, base.weight, base.bias, *factors, self.scaling[NAME])


def adapted_layers(causal_lm: Any) -> dict[str, Adapted]:
    """The layers with an adapter, by the model's name of their weight."""
    layers = {name: module for name, module in causal_lm.named_modules() if hasattr(module, "lora_A")}
    return {f"{name}.weight": Adapted(name, layer) for name, layer in layers.items()}


def model_name(name: str) -> str:
    """What the model without an adapter calls this parameter; an adapter's own has a short name."""
    return name.replace(".base_layer.", ".").replace(f".{NAME}.", ".")


def factor_b(layer: str) -> str:
    """Short name of a layer's second factor."""
    return f"{layer}.lora_B.weight"


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def adapter_off(causal_lm: Any) -> Iterator[None]:
    """Inside, the model computes as it was before it had an adapter."""
    layers = [one.layer for one in adapted_layers(causal_lm).values()]
    for layer in layers:
        layer.adapter_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_off = False


def without_adapter(policy: Policy) -> Scores:
    """The policy as it was before it had an adapter: the reference, for which no second model is held."""

    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with adapter_off(policy.causal_lm):
            scores: tuple[torch.Tensor, torch.Tensor] = policy(*args)
            return scores

    return forward
