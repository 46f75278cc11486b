import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.cases import case_named
from benchmarks.gpu.devices import Watch
from benchmarks.gpu.ours import run_ours
from benchmarks.gpu.processes import Failed, Program, tail_of
from tests.benchmarks.test_gpu_record import setting

RUN = """#!{python}
import json, sys, time
from pathlib import Path
given = dict(one.partition("=")[::2] for one in sys.argv[1:])
run = Path(given["run.dir"])
run.mkdir()
row = {{"phase/train": 0.5, "phase/weight_sync": 0.0, "rollout/completion_tokens": 1024.0, "step/seconds": 1.0}}
for step in range(1, min({steps}, int(given["run.steps"])) + 1):
    with open(run / "metrics.jsonl", "a") as rows:
        rows.write(json.dumps({{"event": "step", "step": step, "time": 100.0 + step, **row}}) + "\\n")
    spans = {{"step": step, "lane": "rollout", "what": "sample", "start": 99.5 + step, "end": 100.0 + step}}
    with open(run / "timeline.jsonl", "a") as rows:
        rows.write(json.dumps(spans) + "\\n")
print("out of memory", flush=True)
sys.exit(3)
"""
"""Stands for the interpreter: it makes so many steps of a second, and then it fails."""


def run(tmp_path: Path, steps: int) -> list[dict[str, Any]]:
    python = tmp_path / "python"
    python.write_text(RUN.format(python=sys.executable, steps=steps))
    python.chmod(0o755)
    one = replace(setting(tmp_path, "cpu"), python=python, warmup=1, steps=2)
    kept: list[dict[str, Any]] = []
    try:
        run_ours(case_named("s1"), ["2", "3"], one, tmp_path, Watch(), time.monotonic() + 60, kept.append)
    finally:
        (tmp_path / "kept.json").write_text(json.dumps(kept))
    return kept


def test_each_length_is_kept_once_its_steps_and_what_was_sampled_beside_them_are_there(tmp_path: Path) -> None:
    first, second = run(tmp_path, steps=10)
    assert (first["tokens"], second["tokens"]) == ("2", "3")
    assert first["window"] == (102.0, 104.0)  # steps 3 and 4, behind two others
    assert second["window"][0] == 107.0 and second["seconds"] == 1.0
    assert first["generation"] == 0.5 and first["idle"]["engines"] == 0.5
    assert first["wanted_tokens"] == 1024 and "config.yaml" in first["plan"]["why"]
    rules = json.loads((tmp_path / "lengths.json").read_text())["rules"]
    assert rules == {"3": [{"batches": 5, "tokens": 2}, {"batches": 5, "tokens": 3}]}


def test_a_run_that_fails_leaves_the_lengths_that_it_went_through(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="grpo ended with exit code 3"):
        run(tmp_path, steps=9)
    assert [one["tokens"] for one in json.loads((tmp_path / "kept.json").read_text())] == ["2"]
    assert tail_of(tmp_path / "grpo.log") == "out of memory"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 9


def test_a_program_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    program = Program([sys.executable, "-c", code], tmp_path / "it.log", {})
    program.wait(lambda: tail_of(program.log) != "", time.monotonic() + 60)
    program.end()
    assert program.process.poll() is not None
    child = int(tail_of(program.log))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_is_not_ready_in_time_is_told(tmp_path: Path) -> None:
    program = Program([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "slow.log", {})
    with pytest.raises(Failed, match="slow was not ready"):
        program.wait(lambda: False, time.monotonic() + 0.3)
    program.end()
