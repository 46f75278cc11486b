"""The face of the program: exit codes, errors in one block, nothing heavy before parsing."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import grpo
from grpo import cli
from grpo.algorithm.intervals import Evaluation
from grpo.config import Config
from grpo.errors import ConfigError, DeadlineExceeded, WeightSyncError

runner = CliRunner()
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "plotly", "numpy"}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: ./x}\ndata: {source: arithmetic}\n")
    return path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for grpo.cluster: remembers the configurations; `error` is raised if set."""
    fake = types.SimpleNamespace(configs=[], error=None)

    def called(config: Config, result: object) -> object:
        fake.configs.append(config)
        if fake.error:
            raise fake.error
        return result

    module = types.ModuleType("grpo.cluster")
    module.train = lambda config, began: called(config, Path(config.run.dir))  # type: ignore[attr-defined]
    scores = [Evaluation("greedy", 7, 1, {"pass@1": 0.25, "tokens": 3.0}, {"pass@1": (0.125, 0.375)})]
    module.evaluate = lambda config, full: called(config, scores)  # type: ignore[attr-defined]
    module.warm_up = lambda config, began: called(config, Path(config.run.dir, "sft", "policy"))  # type: ignore[attr-defined]
    report = types.ModuleType("grpo.observe.report")
    report.write_report = lambda run: Path(run) / "report.html"  # type: ignore[attr-defined]
    for name, stand_in in (("cluster", module), ("observe.report", report)):
        monkeypatch.setitem(sys.modules, f"grpo.{name}", stand_in)
        monkeypatch.setattr(grpo, name, stand_in, raising=False)
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("signal.signal", lambda *_: previous)
    return fake


def test_train_hands_on_the_whole_configuration_and_says_where_the_report_is(
    run_file: Path, cluster: types.SimpleNamespace
) -> None:
    result = runner.invoke(cli.app, ["train", str(run_file), "run.dir=runs/a", "train.learning_rate=2e-6"])
    assert result.exit_code == 0, result.output
    assert [(config.run.dir, config.train.learning_rate) for config in cluster.configs] == [("runs/a", 2e-6)]
    assert "The report: runs/a/report.html" in result.stdout
    assert "grpo export runs/a OUT" in result.stdout and "run.dir=runs/a-2 run.seed=1" in result.stdout


def test_eval_prints_the_scores(run_file: Path, cluster: types.SimpleNamespace) -> None:
    result = runner.invoke(cli.app, ["eval", str(run_file), "model.path=runs/x/checkpoints/step_000045/policy"])
    assert result.exit_code == 0, result.output
    assert cluster.configs[0].model.path == "runs/x/checkpoints/step_000045/policy"
    assert "pass@1" in result.stdout and "0.25" in result.stdout and "0.125 to 0.375" in result.stdout
    assert "7 prompts x 1" in result.stdout


def test_eval_of_a_model_writes_its_scores(run_file: Path, cluster: types.SimpleNamespace, tmp_path: Path) -> None:
    model, out = tmp_path / "run" / "policy", tmp_path / "new" / "scores.json"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    arguments = ["eval", str(run_file), "eval.prompts=9", "--of", str(tmp_path / "run"), "--full", "--out", str(out)]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert (cluster.configs[0].model.path, cluster.configs[0].eval.prompts) == (str(model), 9)
    (scores,) = json.loads(out.read_text())["scores"]
    assert (scores["name"], scores["intervals"]["pass@1"]) == ("greedy", [0.125, 0.375])


def test_eval_of_what_is_no_model_starts_nothing(
    run_file: Path, cluster: types.SimpleNamespace, tmp_path: Path
) -> None:
    result = runner.invoke(cli.app, ["eval", str(run_file), "--of", str(tmp_path)])
    assert (result.exit_code, cluster.configs) == (2, [])
    assert "must be the folder of a run or of a model" in result.stderr


def test_scores_that_cannot_be_written_are_refused_before_they_are_found(
    run_file: Path, cluster: types.SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for out, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "scores.json", "must be written there, but: File exists"),
        (tmp_path / ("x" * 253), "File name too long"),  # with what is written first
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/scores.json"), "must be written there"),
    ):
        result = runner.invoke(cli.app, ["eval", str(run_file), "eval.prompts=9", "--out", str(out)])
        assert (result.exit_code, cluster.configs) == (2, [])
        assert says in result.stderr and "give another file" in result.stderr


def test_sft_says_what_grpo_begins_with(run_file: Path, cluster: types.SimpleNamespace) -> None:
    result = runner.invoke(cli.app, ["sft", str(run_file), "run.dir=runs/a", "sft.epochs=2"])
    assert result.exit_code == 0, result.output
    assert [(config.run.dir, config.sft.epochs) for config in cluster.configs] == [("runs/a", 2.0)]
    assert "The report: runs/a/sft/report.html" in result.stdout
    assert f"grpo train {run_file} model.path=runs/a/sft/policy" in result.stdout


def test_eval_without_held_out_prompts_starts_nothing(run_file: Path, cluster: types.SimpleNamespace) -> None:
    result = runner.invoke(cli.app, ["eval", str(run_file), "eval.prompts=0"])
    assert (result.exit_code, cluster.configs) == (2, [])
    assert "eval.prompts = 0" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (DeadlineExceeded("b"), 10), (WeightSyncError("c"), 15), (KeyboardInterrupt(), 11)],
)
def test_a_typed_error_is_one_block_and_its_exit_code(
    run_file: Path, cluster: types.SimpleNamespace, error: BaseException, code: int
) -> None:
    cluster.error = error
    result = runner.invoke(cli.app, ["train", str(run_file)])
    assert result.exit_code == code
    assert result.stderr == f"error: {str(error) or 'stopped by Ctrl-C'}\n"
    assert result.stdout == ""


def test_any_other_exception_is_our_bug_and_keeps_its_traceback(run_file: Path, cluster: types.SimpleNamespace) -> None:
    cluster.error = ZeroDivisionError("ours")
    result = runner.invoke(cli.app, ["train", str(run_file)])
    assert result.exit_code == 1 and result.exception is cluster.error


def test_several_problems_stay_in_one_block(run_file: Path) -> None:
    result = runner.invoke(cli.app, ["train", str(run_file), "run.steps=0", "train.learning_rat=1e-6"])
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: run.steps = 0: must be greater than or equal to 1")
    assert second == "       train.learning_rat = 1e-06: unknown key; did you mean train.learning_rate?"


def test_config_show_and_schema(run_file: Path) -> None:
    shown = runner.invoke(cli.app, ["config", "show", str(run_file), "run.seed=7"])
    assert Config.model_validate(yaml.safe_load(shown.stdout)).run.seed == 7
    schema = runner.invoke(cli.app, ["config", "schema"])
    assert json.loads(schema.stdout) == Config.model_json_schema()


def test_version_and_help_name_every_verb() -> None:
    assert runner.invoke(cli.app, ["--version"]).stdout == f"grpo {grpo.__version__}\n"
    text = runner.invoke(cli.app, ["--help"]).stdout
    verbs = ["train", "eval", "report", "export", "plan", "config"]
    assert [verb for verb in verbs if f"\n  {verb} " not in text] == []


def test_an_unknown_verb_is_a_usage_error() -> None:
    assert runner.invoke(cli.app, ["trian"]).exit_code == 2


PROBE = """
import atexit, sys
atexit.register(lambda: print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules})))
from grpo.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "RUN", "train.epochs=0"], 2),
        (["config", "show", "RUN"], 0),
    ],
)
def test_nothing_heavy_is_imported_before_parsing(run_file: Path, arguments: list[str], code: int) -> None:
    words = [str(run_file) if word == "RUN" else word for word in arguments]
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert "grpo" in loaded and loaded & HEAVY == set()


def test_sigterm_is_a_clean_end_with_its_own_code(tmp_path: Path, run_file: Path) -> None:
    """Before Ray is up too: a train that hangs in its imports."""
    program = f"""
import sys, time, types
sys.modules["grpo.observe.report"] = types.SimpleNamespace(write_report=None)
import grpo
grpo.cluster = sys.modules["grpo.cluster"] = types.ModuleType("grpo.cluster")
def train(config, began):
    print("ready", flush=True)
    time.sleep(60)
grpo.cluster.train = train
sys.argv = ["grpo", "train", {str(run_file)!r}]
from grpo.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (11, "error: stopped by SIGTERM\n")
