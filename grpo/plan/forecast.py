"""What `grpo plan` tells: memory, seconds a step, and the best splits of the GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.plan.gpus import gpu_named
from grpo.plan.measured import Measured, Row, measured
from grpo.plan.memory import Plan, make_plan
from grpo.plan.model_size import read_shape
from grpo.plan.placement import with_engines
from grpo.plan.speed import Work, work_of
from grpo.plan.splits import Split, gpus_used, predicted, splits

MOST_GPUS, MOST_NUMBER = 1024, 1e9
BEST = 5
"""Splits that are told."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked beside the configuration; None where that, the GPU's type or the run `source` says it."""

    gpu: str
    gpu_gib: float | None = None
    gpus: int | None = None
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """`own` is the run as it is configured; None where `note` says why nothing is known of its speed.

    `most` is the same with all engines that may join it.
    """

    memory: Plan
    work: Work
    source: str
    own: Split | None = None
    most: Split | None = None
    gpus: int = 0
    splits: Sequence[Split] = ()
    measured_seconds: float | None = None
    note: str = ""


def forecast(
    config: Config,
    question: Question,
    known: Config | None = None,
    rows: Sequence[Row] = (),
    spans: Sequence[Row] = (),
) -> Forecast:
    """The answer; by the rates of a run of the same model if one is given. Raises ConfigError."""
    check_numbers(question)
    gpu = gpu_named(question.gpu)
    gpu_gib = question.gpu_gib or gpu.memory_gib
    memory = make_plan(config, gpu_gib)
    found = _measured(config, question, known, rows, spans) if known else None
    prompt = question.prompt_tokens or (found.work.prompt_tokens if found else None)
    completion = question.completion_tokens or (found.work.completion_tokens if found else None)
    work = work_of(config, prompt, completion)
    if found:  # what the wait for the longest one cost is in the rate already
        work = replace(work, longest=work.completion_tokens)
    source = f"by the rates of {question.source} ({found.steps} steps)" if found else f"on {question.gpu.upper()}"
    if config.cluster.device == "cpu" and not found:
        return Forecast(memory, work, source, note="not known on a CPU; make a few steps, then --from RUN")
    rates = found.rates if found else None
    own = predicted(config, gpu, gpu_gib, work, rates)
    all_engines = with_engines(config, config.rollout.most_engines)
    most = predicted(all_engines, gpu, gpu_gib, work, rates) if config.rollout.elastic else None
    seconds = found.seconds if found else None
    if config.cluster.device == "cpu":
        note = "both pools share the cores of one machine, so there is nothing to split"
        return Forecast(memory, work, source, own, most, measured_seconds=seconds, note=note)
    gpus = question.gpus or min(MOST_GPUS, max(2, gpus_used(config)))
    all_splits = splits(config, gpu, gpu_gib, gpus, work, rates)
    note = "" if all_splits else f"{gpus} GPUs cannot be filled by engines and ranks of this run"
    if config.cluster.colocate:
        note = "what it takes engines to fall asleep and to wake is not in these figures; the splits have no turns"
    elif any(share < 1 for share in (config.rollout.gpus_per_engine or 1, config.train.gpus_per_rank or 1)):
        note = "engines and ranks that share a GPU slow each other down, which is not in these figures"
    elif all_splits and found and known and known.rollout.sharing > 1:
        note = "the rates are those of engines that share a GPU; those of the splits have one each, and are faster"
    return Forecast(memory, work, source, own, most, gpus, all_splits[:BEST], seconds, note)


def check_numbers(question: Question) -> None:
    """Raises ConfigError for numbers that are none, which options let through, or too many GPUs."""
    given = {
        "--gpu-gib": question.gpu_gib,
        "--prompt-tokens": question.prompt_tokens,
        "--completion-tokens": question.completion_tokens,
    }
    for name, value in given.items():
        if value is not None and not 0 < value < MOST_NUMBER:
            raise ConfigError(f"{name} = {value}: must be above 0 and below {MOST_NUMBER:g}; correct it")
    if question.gpus is not None and question.gpus > MOST_GPUS:
        raise ConfigError(f"--gpus = {question.gpus}: a split is looked for on at most {MOST_GPUS}; give fewer")


def _measured(config: Config, question: Question, known: Config, rows: Sequence[Row], spans: Sequence[Row]) -> Measured:
    if read_shape(known) != read_shape(config) or known.model.dtype != config.model.dtype:
        raise ConfigError(
            f"--from {question.source}: rates are those of one model, but that run's model.path = {known.model.path} "
            f"({known.model.dtype}) has other sizes than {config.model.path} ({config.model.dtype}); give another run"
        )
    return measured(rows, spans, known, gpu_named(question.gpu), question.source)


def plain(told: Forecast) -> Mapping[str, object]:
    """As JSON has it."""
    return asdict(told)
