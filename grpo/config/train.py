"""How the policy is updated."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from grpo.config.fields import Actors, BoolOrAuto, Decay, Gpus, Positive, TokensOrAuto
from grpo.config.lora import Lora
from grpo.config.section import Section


class Train(Section):
    """How the policy is updated, and by how many ranks."""

    ranks: Actors = 1
    """DeepSpeed data-parallel ranks, one actor each."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what the ranks shard (1 optimizer states, 2 also gradients, 3 also weights)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: fp32 weights and AdamW's moments lie in host memory, where its CPU updates them: less of a GPU, slower."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu, at zero_stage 3, with offload_optimizer: weights too, which come to the GPU layer by layer; much slower."""
    gpus_per_rank: Gpus | None = None
    """Ray GPUs a rank reserves; null: 1 on CUDA, 0 on CPU."""
    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine reach 0 behind run.steps, also a new one."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """GRPO steps over which the learning rate rises from 0; at most run.steps."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled weight decay of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    """Gradients are scaled down to this global norm."""
    epochs: int = Field(1, ge=1, le=1000)
    """Passes over each step's batch."""
    minibatches: Positive = 1
    """Shuffled minibatches of a pass; each is one optimizer update."""
    tokens_per_micro_batch: TokensOrAuto = "auto"
    """Token budget of one packed forward pass; auto: what a GPU takes, on the CPU 8192 or model.max_length."""
    max_skipped_updates: int = Field(3, ge=0, le=1_000_000)
    """Updates in a row with a loss or gradient that is not finite that are skipped; one more ends the run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    compile: BoolOrAuto = "auto"
    """Run the decoder layers under torch.compile; auto: on GPUs below zero_stage 3. Not as bit-stable as without."""
    lora: Lora | None = None
    """Train a low-rank adapter alone; engines get it merged. {}: one of rank 16 on all linear layers; null: none."""

    @property
    def offloads(self) -> tuple[str, ...]:
        """The keys that move something to the host's memory."""
        return tuple(key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "cpu")

    @model_validator(mode="after")
    def _check_offload(self) -> "Train":
        if self.offload_param == "cpu" and self.zero_stage != 3:
            raise ValueError(
                "weights can leave the GPU where each layer's are fetched for its turn, at ZeRO stage 3: "
                f"train.offload_param is cpu, but train.zero_stage = {self.zero_stage}; use zero_stage: 3, or "
                "offload_optimizer alone"
            )
        if self.offload_optimizer == "cpu" and self.zero_stage < 2:
            raise ValueError(
                "optimizer states leave the GPU with their rank's part of the gradients, from ZeRO stage 2 on "
                "(at stage 1 DeepSpeed may add an update's to the next): train.offload_optimizer is cpu, but "
                f"train.zero_stage = {self.zero_stage}; use zero_stage: 2, also for one rank"
            )
        if self.offload_param == "cpu" and self.offload_optimizer != "cpu":
            raise ValueError(
                "DeepSpeed updates weights where its optimizer lies: train.offload_param is cpu, but "
                "train.offload_optimizer = none; set it to cpu, too"
            )
        if self.offload_optimizer == "cpu" and self.lora and self.offload_param != "cpu":
            raise ValueError(
                "only an adapter's own optimizer states are held, which are small, and their way to the host would "
                "cost more than they take: train.offload_optimizer is cpu beside train.lora; remove it, or let the "
                "frozen weights go along with zero_stage: 3 and offload_param: cpu"
            )
        return self


def no_offload(keys: Sequence[str], found: str) -> str:
    """Why nothing is offloaded on a CPU."""
    return (
        "offloading moves what a GPU holds to the host's memory, where on a CPU all of it lies already: "
        f"train.{keys[0]} is cpu, but {found}; remove it"
    )
