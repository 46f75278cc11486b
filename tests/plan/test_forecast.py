"""What `grpo plan` says of speed: from the configuration, from a run's rows, and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grpo import cli
from grpo.config import Config
from grpo.config.load import dump_config
from grpo.errors import ConfigError
from grpo.plan.forecast import Question, forecast, plain
from grpo.plan.gpus import GPUS
from grpo.plan.measured import measured
from grpo.plan.splits import configurations
from grpo.plan.table import speed_lines
from tests.plan.planned import QWEN_1_5B, SMOLLM2, config

ROLLOUT = {"prompts_per_step": 64, "samples_per_prompt": 8, "max_tokens": 200}


def run_of(folder: Path, **sections: Any) -> Config:
    sections["rollout"] = ROLLOUT | sections.get("rollout", {})
    return config(folder, QWEN_1_5B, **({"cluster": {"device": "cuda"}} | sections))


def made(ahead: bool = False, steps: int = 5) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a run whose steps sample 4 s and train 3 s; the first two are slower. `ahead`: a switch takes 0.5 s."""
    rows: list[dict[str, Any]] = [{"event": "weight_sync", "step": 0, "sync/seconds": 60.0}]
    spans: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        slow = 10.0 if step <= 2 else 0.0
        row = {"event": "step", "step": step, "rollout/completion_tokens": 51_200, "rollout/prompt_tokens": 6_400,
               "phase/train": 3.0 + slow, "step/seconds": 8.0 + slow}  # fmt: skip
        sync = {"sync/seconds": 1.0, "sync/switch_seconds": 0.5, "sync/receive_seconds": 2.0}
        rows += [row, {"event": "weight_sync", "step": step, **sync}] if ahead else [row | {"sync/seconds": 1.0}]
        begin = 20.0 * step
        spans += [{"lane": "rollout", "what": "sample", "step": step, "start": begin, "end": begin + 3.0 + slow},
                  {"lane": "rollout", "what": "sample", "step": step, "start": begin + 2.0 + slow,
                   "end": begin + 4.0 + slow},
                  {"lane": "trainer", "what": "train", "step": step, "start": begin, "end": begin + 9.0}]  # fmt: skip
    return rows, spans


def test_rates_of_a_run_leave_out_its_first_steps(tmp_path: Path) -> None:
    found = measured(*made(), run_of(tmp_path), GPUS["H200"], "runs/x")
    assert (found.steps, found.seconds, found.rates.sync) == (3, 8.0, 1.0)
    assert found.rates.engine_tokens == pytest.approx(51_200 / 4.0)
    assert (found.work.prompt_tokens, found.work.completion_tokens) == (100, 100)


@pytest.mark.parametrize(("staleness", "seconds"), [(0, 4.0 + 3.0 + 1.0), (1, 3.0 + 2.0), (2, 4.0 + 0.5)])
def test_a_run_is_predicted_from_its_own_rates(tmp_path: Path, staleness: int, seconds: float) -> None:
    run = run_of(tmp_path, rollout={"max_staleness": staleness, "max_tokens": 100})
    told = forecast(run, Question("H200", source="runs/x"), run, *made(ahead=staleness > 0))
    assert told.own and told.own.step.seconds == pytest.approx(seconds)
    assert told.measured_seconds == 8.0 and "by the rates of runs/x (3 steps)" in speed_lines(told)[0]


def test_a_run_whose_engines_come_and_go_is_told_with_the_fewest_and_with_all(tmp_path: Path) -> None:
    run = run_of(tmp_path, rollout={"max_tokens": 100, "engines": {"min": 1, "max": 2}})
    rows, spans = made()
    told = forecast(
        run, Question("H200", source="runs/x"), run, [row | {"pipeline/engines": 2.0} for row in rows], spans
    )
    assert told.own and told.most and (told.own.step.engines, told.most.step.engines) == (1, 2)
    assert told.own.step.sampling == pytest.approx(2 * told.most.step.sampling)
    assert told.most.step.seconds == pytest.approx(told.measured_seconds or 0.0), "two sampled in that run"
    lines = speed_lines(told)
    assert lines[1].startswith("this run, 1 engine, ") and lines[2].startswith("with all that may join, 2 engines, ")


def test_other_splits_by_the_rates_of_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, rollout={"max_staleness": 2, "max_tokens": 100})
    told = forecast(run, Question("H200", gpus=5, source="runs/x"), run, *made(ahead=True))
    best = told.splits[0].step
    assert (best.engines, best.ranks, best.sampling) == (3, 2, pytest.approx(4 / 3))
    assert [split.step.seconds for split in told.splits] == sorted(split.step.seconds for split in told.splits)


@pytest.mark.parametrize(
    ("rows", "spans", "said"),
    [
        ([], [], "must say its rollout/completion_tokens"),
        (made()[0], [], "timeline.jsonl must say when it sampled"),
        ([row | {"phase/train": "x"} for row in made()[0]], made()[1], "must say its phase/train"),
        ([row | {"rollout/prompt_tokens": -1} for row in made()[0]], made()[1], "must say its rollout/prompt_tokens"),
        (made()[0], [span | {"end": span["start"] - 5} for span in made()[1]], "must say when it sampled"),
    ],
)
def test_rows_that_say_nothing_are_refused(tmp_path: Path, rows: Any, spans: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--from runs/x: .*{said}.*; give the folder of another run"):
        measured(rows, spans, run_of(tmp_path), GPUS["H200"], "runs/x")


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = config(tmp_path / "other", SMOLLM2)
    with pytest.raises(ConfigError, match="rates are those of one model"):
        forecast(run_of(tmp_path), Question("H200", source="runs/x"), other, *made())


def test_splits_that_do_not_fit_come_last_and_say_why(tmp_path: Path) -> None:
    told = forecast(run_of(tmp_path), Question("A100-40", gpu_gib=24, gpus=3))
    assert told.splits and all(split.problem for split in told.splits)
    assert "; does not fit: a trainer rank needs" in speed_lines(told)[-1]
    fits = forecast(run_of(tmp_path, train={"zero_stage": 3}), Question("H100", gpus=8, completion_tokens=150))
    assert not fits.splits[0].problem and fits.splits[0].gpus == 8
    assert all(split.step.engines * split.step.tensor_parallel + split.step.ranks == 8 for split in fits.splits)


def test_an_engine_of_several_gpus_is_split_both_ways(tmp_path: Path) -> None:
    run = run_of(tmp_path, rollout={"tensor_parallel": 4, "max_staleness": 1})
    told = forecast(run, Question("H200", gpus=16))
    assert told.own and told.own.gpus == 5 and {split.step.tensor_parallel for split in told.splits} <= {1, 4}
    assert "1 engine x 4 GPUs, 1 rank" in speed_lines(told)[1]


def test_on_a_cpu_only_a_run_tells(tmp_path: Path) -> None:
    run = run_of(tmp_path, cluster={"device": "cpu"})
    assert speed_lines(forecast(run, Question("H100"))) == [
        "speed: not known on a CPU; make a few steps, then --from RUN"
    ]
    told = forecast(run, Question("H100", source="runs/x"), run, *made())
    assert told.own and not told.splits and "nothing to split" in speed_lines(told)[-1]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (Question("H100", gpu_gib=float("nan")), "--gpu-gib = nan"),
        (Question("H100", prompt_tokens=float("inf")), "--prompt-tokens = inf"),
        (Question("H100", completion_tokens=float("nan")), "--completion-tokens = nan"),
        (Question("H100", gpus=10**9), "--gpus = 1000000000"),
        (Question("rtx"), "--gpu must be one of"),
    ],
)
def test_odd_numbers_are_refused(tmp_path: Path, question: Question, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        forecast(run_of(tmp_path), question)


def test_many_gpus_are_no_long_search(tmp_path: Path) -> None:
    run = run_of(tmp_path, rollout={"prompts_per_step": 4096})
    assert len(forecast(run, Question("H200", gpus=1024)).splits) == 5
    assert len(list(configurations(run, 1024, [1, 4]))) == 2 * 64


def test_the_command_prints_lines_or_one_object(tmp_path: Path) -> None:
    run = run_of(tmp_path, data={"source": "arithmetic"})
    (tmp_path / "run.yaml").write_text(dump_config(run))
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(run))
    for name, rows in zip(("metrics.jsonl", "timeline.jsonl"), made(), strict=True):
        lines = [json.dumps({"event": "span"} | row) for row in rows]
        (folder / name).write_text("".join(line + "\n" for line in lines))
    asked = ["plan", str(tmp_path / "run.yaml"), "--gpu", "h200", "--from", str(folder)]
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    assert "this run, 1 engine, 1 rank: 8.00 s a step (sampling 4.00, training 3.00, sync 1.00)" in shown.stdout
    told = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).stdout)
    assert told["own"]["step"]["seconds"] == pytest.approx(8.0) and told["memory"]["parameters"] == 1_543_714_304
    missing = CliRunner().invoke(cli.app, [*asked[:-1], str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "nowhere" in missing.stderr


def test_all_of_it_is_plain(tmp_path: Path) -> None:
    json.dumps(plain(forecast(run_of(tmp_path), Question("B200", gpus=4))), allow_nan=False)


@pytest.mark.parametrize(("shared", "noted"), [({"gpus_per_engine": 0.5}, True), ({"engines_per_gpu": 2}, False)])
def test_what_the_figures_do_not_know_of_shared_gpus_is_noted(
    tmp_path: Path, shared: dict[str, Any], noted: bool
) -> None:
    run = run_of(tmp_path, rollout={"engines": 2, "memory_utilization": 0.4} | shared)
    note = forecast(run, Question("H200"), None).note
    assert ("share a GPU slow each other down" in note) == noted
    note = forecast(run, Question("H200", source="runs/x"), run, *made()).note
    assert ("the rates are those of engines that share a GPU" in note) == (not noted)
