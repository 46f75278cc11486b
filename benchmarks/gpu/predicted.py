"""What `grpo plan` says of the runs that were measured: from their configuration alone, and from their own rates."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.cases import Phase
from benchmarks.gpu.record import FILES, Json, rows_of
from grpo.config.load import load_config
from grpo.plan.forecast import Forecast, Question, forecast


def predict(record: Json, phase: Phase, folder: Path, gpu: str, prompt: float, mean: float, longest: int) -> Json:
    """Seconds a step, idle shares and the errors of both; `folder` holds the run's configuration and rows."""
    file = folder / FILES[2]
    config = load_config(file, [f"rollout.max_tokens={longest}"])
    question = Question(gpu, prompt_tokens=prompt, completion_tokens=mean, source=str(folder))
    rows, spans = (
        [row for row in rows_of(folder / name) if phase.start <= int(row.get("step") or 0) <= phase.last]
        for name in FILES[:2]
    )
    return {
        "config": said(forecast(config, question), record),
        "from": said(forecast(config, question, load_config(file, []), rows, spans), record),
    }


def said(told: Forecast, record: Json) -> Json | None:
    """One prediction against what was measured; None where there is none, as on a CPU."""
    if told.own is None:
        return None
    step = told.own.step
    return {
        "seconds": step.seconds,
        "error": step.seconds / record["mean"] - 1,
        "sampling": step.sampling,
        "training": step.training,
        "sync": step.sync,
        "idle": {"engines": step.rollout_idle, "trainer": step.trainer_idle},
    }


def errors(records: Sequence[Json], kind: str) -> list[float]:
    """Of all records that have such a prediction."""
    told = [(record.get("plan") or {}).get(kind) for record in records]
    return [one["error"] for one in told if one]
