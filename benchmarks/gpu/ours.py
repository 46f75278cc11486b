"""One of our cases: `grpo train`, through one kind of length after the other, and what its own rows say of each.

A start takes longer than the steps that count, so the run goes on from one length to the next: `lengths.py` says when.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case, Phase, phases_of
from benchmarks.gpu.devices import Watch, summary
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.lengths import VARIABLE
from benchmarks.gpu.predicted import predict
from benchmarks.gpu.processes import Program
from benchmarks.gpu.record import FILES, Json, covered, record, rows_of
from benchmarks.gpu.setting import Setting
from grpo.errors import GrpoError

YAML = Path(__file__).with_name("grpo.yaml")
PASSED = ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_NCCL_SO_PATH", "TORCH_SYMM_MEM_DISABLE_MULTICAST")
"""Of the shell's variables those that may decide about a local Ray: what the machine's libraries lack."""
MARGIN = 2
"""Steps that are asked for beyond those that count, and never awaited."""


def settings_of(case: Case, tokens: Sequence[str], setting: Setting, run: Path) -> list[str]:
    """The overrides of a run."""
    work, longest = setting.work, max(map(setting.work.longest, tokens))
    per_gpu = case.setting("rollout.engines_per_gpu", setting.engines_per_gpu if setting.device == "cuda" else 1)
    pool = setting.pool(case.turns)
    passed = [name for name in PASSED if name in os.environ]
    own = [
        f"run.dir={run}",
        f"model.path={setting.model}",
        f"model.max_length={work.longest_prompt + longest}",
        f"data.source={setting.prompts}",
        f"rollout.prompts_per_step={len(work.prompts)}",
        f"rollout.samples_per_prompt={work.samples}",
        f"rollout.max_tokens={longest}",
        f"rollout.engines={pool * per_gpu}",
        f"rollout.engines_per_gpu={per_gpu}",
        f"train.ranks={pool}",
        f"cluster.device={setting.device}",
        f"cluster.environment={json.dumps(passed)}",
    ]
    if setting.device == "cpu":
        own += ["rollout.kv_cache_gib=0.25", "rollout.enforce_eager=true", "sync.tolerance=0.02"]  # few layers
    return [*own, *setting.base, *case.settings]


def run_ours(
    case: Case,
    tokens: Sequence[str],
    setting: Setting,
    folder: Path,
    watch: Watch,
    until: float,
    keep: Callable[[Json], None],
) -> None:
    """Gives `keep` the record of each length as soon as it is there. Raises Failed."""
    run = folder / "run"
    phases = phases_of(tokens, case.ahead, setting.warmup, setting.steps)
    rules = folder / "lengths.json"
    longest = str(max(map(setting.work.longest, tokens)))
    steps = [setting.work.phase(phase.tokens, phase.end - phase.start + 1) for phase in phases]
    rules.write_text(json.dumps({"samples": setting.work.samples, "rules": {longest: steps}}))
    # The working folder is the repository: reward code is found there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command: list[str | Path] = [setting.python, "-m", "grpo", "train", YAML, *settings_of(case, tokens, setting, run)]
    command.append(f"run.steps={phases[-1].end + MARGIN}")
    began = time.time()
    program = Program(command, folder / "grpo.log", environment | {VARIABLE: str(rules)}, ROOT)
    left = list(phases)

    def done() -> bool:
        while left and last_step(run / FILES[0]) >= left[0].end:  # what was sampled beside is then over, and written
            copy_rows(run, folder)
            keep(record_of(case, left.pop(0), setting, folder, watch, began))
        return not left

    try:
        program.wait(done, until)
    finally:
        copy_rows(run, folder)


def copy_rows(run: Path, folder: Path) -> None:
    """What the run has said so far."""
    for name in FILES:
        if (run / name).exists():
            shutil.copy(run / name, folder / name)


def last_step(file: Path) -> int:
    """The newest step that the run has made."""
    return max((int(row["step"]) for row in rows_of(file) if row["event"] == "step"), default=0)


def record_of(case: Case, phase: Phase, setting: Setting, folder: Path, watch: Watch, began: float) -> Json:
    """Of a phase whose steps are all there."""
    rows, spans = rows_of(folder / FILES[0]), rows_of(folder / FILES[1])
    made = {int(row["step"]): row for row in rows if row["event"] == "step"}
    steps = [made[step] for step in range(phase.first, phase.last + 1)]
    found = measure(steps, rows, spans)
    one = {
        "case": case.name,
        "tokens": phase.tokens,
        "start": min(row["time"] - row["step/seconds"] for row in made.values()) - began,
        "gpus": summary(list(watch.looks), *found["window"]),
        "wanted_tokens": setting.work.rows * setting.work.mean(phase.tokens),
        **record(found, setting, case.turns),
    }
    return {**one, "plan": planned(one, phase, setting, folder)}


def planned(one: Json, phase: Phase, setting: Setting, folder: Path) -> Json:
    """What `grpo plan` says of it, or why it says nothing."""
    work = setting.work
    try:
        return predict(
            one, phase, folder, setting.gpu_name, work.mean_prompt, work.mean(phase.tokens), work.longest(phase.tokens)
        )
    except GrpoError as error:
        return {"config": None, "from": None, "why": str(error)}


def measure(steps: Sequence[Mapping[str, Any]], rows: Sequence[Json], spans: Sequence[Json]) -> Json:
    """From the rows of the steps that count, and from what the lanes did in that time."""
    window = (steps[0]["time"] - steps[0]["step/seconds"], steps[-1]["time"])

    def busy(lane: str, *whats: str) -> float:
        own = [(span["start"], span["end"]) for span in spans if span["lane"] == lane and span["what"] in whats]
        return covered(own, *window)

    length = window[1] - window[0]
    within = [row for row in rows if window[0] <= row["time"] <= window[1]]
    switches = [row["sync/switch_seconds"] for row in within if "sync/switch_seconds" in row]
    stall = statistics.median(row["phase/weight_sync"] for row in steps)
    return {
        "window": window,
        "steps": [row["step/seconds"] for row in steps],
        "completion_tokens": statistics.fmean(row["rollout/completion_tokens"] for row in steps),
        "update": statistics.median(row["phase/train"] for row in steps),
        "generation": busy("rollout", "sample") / len(steps),
        "sync": stall + (statistics.median(switches) if switches else 0.0),
        "sync_trainer": stall,
        "idle": {
            "engines": 1 - busy("rollout", "sample", "eval", "switch", "sync") / length,
            "trainer": 1 - busy("trainer", "train", "publish", "sync", "commit") / length,
        },
        "details": {key: statistics.median(row[key] for row in steps if key in row) for key in sorted(shown(steps))},
    }


def shown(steps: Sequence[Mapping[str, Any]]) -> set[str]:
    """Numbers of the run's rows that are kept beside ours."""
    known = {key for row in steps for key, value in row.items() if isinstance(value, int | float)}
    return {key for key in known if key.startswith(("phase/", "sync/", "train/", "rollout/", "pipeline/"))}
