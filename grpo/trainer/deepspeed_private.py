"""All that is used of DeepSpeed beyond its public API, as it is in 0.19.8. Look here first when the pin moves.

Mostly: where a parameter's fp32 weights, AdamW's moments and its step count lie, for each of DeepSpeed's optimizers.
Without ZeRO every rank holds them whole: in fp32 torch's own optimizer on the parameters, in bf16 a list of fp32
copies. At stages 1 and 2 each rank holds a piece of one flat tensor of all parameters, at stage 3 a piece of each
parameter. DeepSpeed's helpers (`safe_get_full_*`) add the pieces up as numbers, which turns -0.0 into 0.0, do not know
the whole ones, and fail before the first update; here the bits travel.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


def leave_ops_uncompiled() -> None:
    """No op is built: DeepSpeed else probes a compiler for each, and builds one with g++ as gloo starts."""
    import deepspeed

    vars(deepspeed.ops)["__compatible_ops__"] = {}


def leave_muon_uncompiled() -> None:
    """Muon, with which nobody trains here, compiles functions as DeepSpeed imports it, in every start; for them torch
    would load its whole compiler, which takes seconds."""
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original


def add_in_place(optimizer: Any) -> None:
    """Stage 1 in bf16: a gradient is added to its fp32 sum as it is; DeepSpeed makes an fp32 copy of it first."""
    if not hasattr(optimizer, "_update_hp_grad"):
        return

    @torch.no_grad()
    def add(param: Any, group: int, place: int, clear_lp_grads: bool) -> None:
        if param.grad is not None:
            total = optimizer.fp32_groups_gradients[group][place]
            total.add_(param.grad.view(total.shape))
            param._hp_grad = total
            optimizer.fp32_groups_has_gradients[group][place] = True

    optimizer._update_hp_grad = add


def forget_sums(optimizer: Any) -> None:
    """After an update that was thrown away. Where its states lie on the host, stage 2 goes on adding to its sums."""
    if getattr(optimizer, "cpu_offload", False):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's piece of one parameter: flat fp32 views by kind, from element `start` on; maybe of no elements.

    `step` is AdamW's count of updates, a scalar that parameters of one flat tensor share.
    """

    views: dict[str, torch.Tensor]
    start: int
    step: torch.Tensor


class Shards:
    """The optimizer states under DeepSpeed, made at once and not in the first update."""

    def __init__(self, optimizer: Any, model: torch.nn.Module, device: torch.device) -> None:
        """`device` is where the ranks train; the states may lie in host memory (`train.offload_optimizer`)."""
        self.optimizer, self.device = optimizer, device
        self.adam: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.trained = [param for param in model.parameters() if param.requires_grad]
        self.whole = not self.stage3 and not hasattr(self.trained[0], "_hp_mapping")
        self.masters: dict[int, torch.Tensor] = {}
        if self.whole and hasattr(optimizer, "fp32_groups"):
            (params,), (copies,) = optimizer.fp16_groups, optimizer.fp32_groups
            self.masters = {id(param): copy for param, copy in zip(params, copies, strict=True)}
        self._make_states()

    def _make_states(self) -> None:
        """As AdamW does when it starts. DeepSpeed's bf16 optimizer without ZeRO has counted an empty update already."""
        if self.stage3:
            masters = list(self.optimizer.fp32_partitioned_groups_flat)
        elif self.whole:
            masters = [self.masters.get(id(param), param) for param in self.trained]
        else:
            masters = self.adam.param_groups[0]["params"]
        for master in masters:
            self.adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def of(self, param: Any) -> Shard:
        """This rank's piece of a parameter."""
        start, offset = 0, 0
        if self.stage3:
            group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(param)]
            master = self.optimizer.fp32_partitioned_groups_flat[group]
            start = size * distributed.get_rank()
            size = min(max(param.ds_numel - start, 0), size)  # behind it DeepSpeed pads
        elif self.whole:
            master = self.masters.get(id(param), param)
            size = param.numel()
        else:
            (master,) = self.adam.param_groups[0]["params"]
            piece = param._hp_mapping
            size = 0
            if piece is not None:
                start, offset = piece.lp_fragment_address.start, piece.hp_fragment_address.start
                size = piece.hp_fragment_address.numel
        state = self.adam.state[master]
        flat = {"master": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return Shard({kind: flat[kind].view(-1).narrow(0, offset, size) for kind in KINDS}, start, state["step"])

    @torch.no_grad()
    def gather(self, param: Any, kind: str) -> torch.Tensor:
        """The whole tensor in the parameter's shape, fp32, on the training device, the same bits on every rank."""
        shard = self.of(param)
        view, shape = shard.views[kind], getattr(param, "ds_shape", param.shape)
        if self.whole:
            return view.view(shape)
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.device)
        bits[shard.start : shard.start + view.numel()] = view.view(torch.int32)
        distributed.all_reduce(bits)  # each element has one owner, all others add 0
        return bits.view(torch.float32).view(shape)

    @torch.no_grad()
    def put(self, param: Any, kind: str, whole: torch.Tensor) -> None:
        """Takes this rank's piece from a whole tensor; no collective."""
        shard = self.of(param)
        view = shard.views[kind]
        view.copy_(whole.reshape(-1)[shard.start : shard.start + view.numel()])
