"""DeepSpeed: process group, engine, one accumulated update, gathered weights. The only module that imports it."""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import distributed

from grpo.config import Train
from grpo.trainer.adapter import adapted_layers
from grpo.trainer.deepspeed_private import (
    Shards,
    add_in_place,
    forget_sums,
    leave_muon_uncompiled,
    leave_ops_uncompiled,
)
from grpo.trainer.model import Policy


def load_deepspeed(device: torch.device, rank: int, world_size: int, local_rank: int, address: str, port: int) -> None:
    """Sets the variables that DeepSpeed reads, and imports it."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": device.type,
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
    import deepspeed  # reads DS_ACCELERATOR when it is imported

    assert deepspeed.__version__
    leave_ops_uncompiled()
    leave_muon_uncompiled()


def start_process_group(device: torch.device, rank: int, world_size: int, address: str, port: int) -> None:
    """Joins the ranks: gloo on the CPU, nccl on CUDA, also for one rank."""
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
    )


class Engine:
    """A policy under DeepSpeed: `update` accumulates the gradients of several losses and makes one optimizer step."""

    def __init__(self, policy: Policy, train: Train, world_size: int) -> None:
        import deepspeed

        first = next(policy.parameters())
        bf16, device = first.dtype == torch.bfloat16, first.device
        optimizer = torch.optim.AdamW(
            [param for param in policy.parameters() if param.requires_grad],
            lr=0.0,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=engine_config(train, bf16), dist_init_required=False
        )
        add_in_place(self.optimizer)
        if train.zero_stage == 3:  # a layer with an adapter computes with weights of the modules inside of it
            for one in adapted_layers(policy).values():
                for param in one.layer.parameters():
                    deepspeed.zero.register_external_parameter(one.layer, param)
        self.world_size = world_size
        self.shards = Shards(self.optimizer, policy, device)

    def __call__(self, *args: object) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of `loss` over all ranks; `last` marks the end of the accumulation.

        DeepSpeed averages over ranks; the loss has the global normaliser already, so the average is undone here.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> tuple[float, float]:
        """Clips and applies the accumulated gradient; returns (norm before clipping, learning rate the optimizer used).

        A norm that is not finite, which all ranks see alike, means that the gradient was thrown away and nothing moved.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._own_norm()  # before the step, which clears the gradients
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()  # the plain optimizer would apply it; DeepSpeed's own skip such an update
            return norm, learning_rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm):
            forget_sums(self.optimizer)
        return norm, float(self.optimizer.param_groups[0]["lr"])

    def _own_norm(self) -> float | None:
        """The norm where DeepSpeed keeps none: stage 0 in fp32, whose gradients are whole on every rank."""
        if hasattr(self.optimizer, "_global_grad_norm") or self.engine.zero_optimization():
            return None
        gradients = [param.grad for param in self.engine.module.parameters() if param.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def close(self) -> None:
        """Leaves the process group."""
        self.engine.destroy()
        distributed.destroy_process_group()


def engine_config(train: Train, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Its own accumulation stays at 1 step: `Engine.backward` sets the boundary itself."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16, "immediate_grad_update": True},  # else each is kept, zeroed and added to once more
        "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    for key in train.offloads:
        config["zero_optimization"] |= {key: {"device": "cpu"}}
    if bf16 and train.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def gathered(params: Sequence[torch.nn.Parameter], modify: bool = False) -> AbstractContextManager[None]:
    """Inside, the parameters are whole on every rank (a collective at ZeRO stage 3, nothing below).

    With `modify` rank 0's changes are what every rank keeps at stage 3; below it each rank keeps its own.
    """
    import deepspeed

    rank = 0 if modify else None
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(params, modifier_rank=rank)
    return context
