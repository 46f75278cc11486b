"""Which split of some GPUs between engines and ranks takes the fewest seconds a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo.config import Config
from grpo.plan.gpus import Gpu
from grpo.plan.memory import make_plan
from grpo.plan.model_size import read_shape
from grpo.plan.placement import grouped
from grpo.plan.speed import Rates, Step, Work, rates_of, step_of

FINEST = 64
"""Numbers of engines that are tried; where more are possible every second, third, ..."""
OWN_GPUS = {"gpus_per_engine": None, "engines_per_gpu": 1}


@dataclass(frozen=True, slots=True)
class Split:
    """A step with so many engines and ranks, and why they do not fit their GPUs, or ""."""

    step: Step
    gpus: int
    problem: str


def gpus_used(config: Config) -> int:
    """Whole GPUs that the run takes."""
    return sum(group.gpus for group in grouped(config, "cuda"))


def predicted(config: Config, gpu: Gpu, gpu_gib: float, work: Work, measured: Rates | None = None) -> Split:
    """The run as it is configured, with its fewest engines; `measured` stands for the rates of the GPU's type."""
    shape, rollout = read_shape(config), config.rollout
    rates = measured or rates_of(config, shape, gpu, work, rollout.fewest_engines, rollout.tensor_parallel)
    step = step_of(config, shape, work, rates, rollout.fewest_engines, rollout.tensor_parallel, config.train.ranks)
    problem = next(iter(make_plan(config, gpu_gib).warnings), "")
    return Split(step, gpus_used(config), problem)


def splits(
    config: Config, gpu: Gpu, gpu_gib: float, gpus: int, work: Work, measured: Rates | None = None
) -> list[Split]:
    """All that fill so many GPUs, those that fit first, then the fastest. Each engine and rank has GPUs of its own."""
    own = config.rollout.tensor_parallel
    parallels = [own] if measured else sorted({1, own})  # an engine's rate was measured on so many GPUs
    found = [predicted(each, gpu, gpu_gib, work, measured) for each in configurations(config, gpus, parallels)]
    return sorted(found, key=lambda split: (bool(split.problem), split.step.seconds, split.step.tensor_parallel))


def configurations(config: Config, gpus: int, parallels: Sequence[int]) -> Iterator[Config]:
    """The same run on other numbers of engines and ranks; an engine needs a prompt, a rank a row of each minibatch."""
    rollout, train = config.rollout, config.train
    most_ranks = rollout.prompts_per_step * rollout.samples_per_prompt // train.minibatches
    for parallel in parallels:
        most = min(gpus // parallel, rollout.prompts_per_step)
        for engines in range(1, most + 1, max(1, most // FINEST)):
            ranks = gpus - engines * parallel
            if 1 <= ranks <= most_ranks:
                sections = {
                    "rollout": {"engines": engines, "tensor_parallel": parallel, **OWN_GPUS},
                    "train": {"ranks": ranks, "gpus_per_rank": None},
                    "cluster": {"device": "cuda", "colocate": False},
                }
                yield config.model_copy(
                    update={name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
                )
