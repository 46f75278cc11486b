"""Where and on what a benchmark runs: what all systems are told."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.limits import shape_of
from benchmarks.gpu.work import Work
from grpo.plan.gpus import Gpu
from grpo.plan.model_size import Shape


@dataclass(frozen=True)
class Setting:
    """`python` runs the systems, `model` and `prompts` are their work, `out` takes what they say."""

    work: Work
    shape_name: str
    gpu_name: str
    gpu: Gpu
    gpus: int
    device: str
    python: Path
    model: Path
    prompts: Path
    out: Path
    warmup: int
    steps: int
    engines_per_gpu: int
    base: tuple[str, ...] = ()

    def pool(self, turns: bool) -> int:
        """GPUs that sample, and as many that train: all of them in turns, or half and half."""
        return self.gpus if turns else self.half

    @property
    def half(self) -> int:
        """GPUs that sample, and as many that train."""
        return max(1, self.gpus // 2)

    @property
    def shape(self) -> Shape:
        return shape_of(self.shape_name)
