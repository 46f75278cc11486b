"""How completions are sampled."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.engines import EnginesOrRange, bounds
from grpo.config.fields import MOST_ROWS, Gibibytes, Gpus, StopText, Tokens
from grpo.config.section import Section


class Rollout(Section):
    """How completions are sampled, and what the engines may use for it."""

    engines: EnginesOrRange = 1
    """Number of vLLM engines, or {min, max}: they come and go with nodes. Each step's prompts are shared evenly."""
    prompts_per_step: int = Field(32, ge=1, le=MOST_ROWS)
    """Prompts of a step (P)."""
    samples_per_prompt: int = Field(8, ge=2, le=MOST_ROWS)
    """Completions of a prompt (G, the N_ROLLOUTS of the original recipe)."""
    max_tokens: Tokens = 512
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """Sampling temperature of the rollouts; the trainer applies it too. vLLM would sample below 0.01 as at 0.01."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the rollouts; only 1 trains, as the trainer's logprobs are over the whole vocabulary."""
    top_k: int = Field(0, ge=0, le=10_000_000)
    """Likeliest tokens that a rollout samples from; 0: all. Anything else is refused: the trainer means all tokens."""
    stop: tuple[StopText, ...] = Field((), max_length=16)
    """Texts that end a completion, with the token that completes one, which stays; the reason is then "stop"."""
    skip_special_tokens: bool = False
    """Leave all special tokens out of the text that rewards see, not only those that end or pad a completion."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Batches that are sampled ahead of training, from weights that are so many versions older. 0: none."""
    update: Literal["between_batches", "in_flight"] = "between_batches"
    """When engines take new weights, if batches are sampled ahead. in_flight: in the middle of completions."""
    refill: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by further prompts (DAPO's dynamic sampling)."""
    max_refills: int = Field(3, ge=1, le=1000)
    """Rounds of further prompts of a step; what is equal in the last one stays in the batch."""
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """GPUs of an engine."""
    engines_per_gpu: int = Field(1, ge=1, le=16)
    """Engines that share a GPU, where one Python thread, which feeds each, is slower than the GPU. 1 on the CPU."""
    gpus_per_engine: Gpus | None = None
    """Ray GPUs an engine reserves; null: tensor_parallel on CUDA. Below 1: a share of one, beside a rank or engines."""
    memory_utilization: float = Field(0.9, gt=0, lt=1)
    """Share of the GPU's memory that an engine takes; of all together with engines_per_gpu."""
    kv_cache_gib: Gibibytes = 1.0
    """KV cache of an engine on the CPU, in GiB."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs and compilation: starts sooner, samples slower."""

    @property
    def fewest_engines(self) -> int:
        """Engines that the run starts with."""
        return bounds(self.engines)[0]

    @property
    def most_engines(self) -> int:
        """Engines that it may have."""
        return bounds(self.engines)[1]

    @property
    def elastic(self) -> bool:
        """Whether engines come and go."""
        return self.fewest_engines < self.most_engines

    @property
    def engines_in_words(self) -> str:
        """`2`, or `1 to 3`."""
        return f"{self.fewest_engines}" + f" to {self.most_engines}" * self.elastic

    @property
    def engine_memory(self) -> float:
        """Share of a GPU's memory of one engine."""
        return self.memory_utilization / self.engines_per_gpu

    @property
    def sharing(self) -> int:
        """Engines on one GPU, at most."""
        share = self.gpus_per_engine or 1.0
        return self.engines_per_gpu if share >= 1 else max(1, min(self.most_engines, int(1.0001 / share)))

    @field_validator("samples_per_prompt", mode="before")
    @classmethod
    def _refuse_a_group_of_one(cls, count: object) -> object:
        if count in (1, "1") and not isinstance(count, bool):
            raise ValueError(
                "must be greater than or equal to 2, as a completion is compared with the others of its prompt: one "
                "alone has the advantage 0 and teaches nothing"
            )
        return count

    @model_validator(mode="after")
    def _check_shared(self) -> "Rollout":
        other = "tensor_parallel" if self.tensor_parallel > 1 else "gpus_per_engine"
        if self.engines_per_gpu > 1 and (self.tensor_parallel > 1 or self.gpus_per_engine is not None):
            raise ValueError(
                f"engines that share a GPU have one each: rollout.engines_per_gpu = {self.engines_per_gpu}, but "
                f"rollout.{other} = {getattr(self, other):g}; remove one of them"
            )
        if self.elastic and self.engines_per_gpu == 1 and (self.gpus_per_engine or 1) < 1:
            raise ValueError(
                f"engines that come and go share no GPU with a rank: rollout.engines has min and max, but "
                f"rollout.gpus_per_engine = {self.gpus_per_engine:g}; remove it, or write engines_per_gpu"
            )
        if self.elastic and (self.fewest_engines % self.engines_per_gpu or self.most_engines % self.engines_per_gpu):
            raise ValueError(
                f"engines that share a GPU come and go together: rollout.engines = {{min: {self.fewest_engines}, "
                f"max: {self.most_engines}}} must be multiples of rollout.engines_per_gpu = {self.engines_per_gpu}"
            )
        return self
