"""`grpo k8s VERB` as a person gives it: what is printed where, exit codes, and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo import cli
from grpo.config.yaml import parse
from grpo.kubernetes.logs import BANNER
from tests.kubernetes.programs import BAD, DONE, RUNNING, Programs, job, pod

ROOT = Path(__file__).parents[2]
runner = CliRunner()


def test_values_go_to_standard_output_and_what_is_needed_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = [
        "k8s",
        "values",
        "examples/quickstart.yaml",
        "run.steps=3",
        "cluster.device=cpu",
        "--registry",
        "localhost",
    ]
    result = runner.invoke(cli.app, asked)
    assert result.exit_code == 0, result.output
    made = parse(result.stdout)
    assert made["config"]["run"] == {"steps": 3} and made["image"] == {
        "registry": "localhost",
        "worker": {"tag": "0.1.0-cpu"},
    }  # type: ignore[index]
    assert result.stderr == "needed beforehand: the images of `make images` in localhost\n"


def test_a_run_that_cannot_fit_has_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = ["k8s", "values", "examples/quickstart.yaml", "cluster.device=cpu", "rollout.kv_cache_gib=0.0001"]
    result = runner.invoke(cli.app, asked)
    assert (result.exit_code, result.stdout) == (2, "") and "rollout.kv_cache_gib holds" in result.stderr
    result = runner.invoke(cli.app, ["k8s", "values", "examples/quickstart.yaml", "--gpu", "Z9"])
    assert (result.exit_code, result.stdout) == (2, "") and "--gpu must be one of" in result.stderr


def test_status_and_logs(programs: Programs) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)])
    programs.items("get pods", [pod("head")])
    programs.answer("logs", {"out": "step 1/2  reward 0.5\n"})
    result = runner.invoke(cli.app, ["k8s", "status", "mine", "-n", "team"])
    assert result.exit_code == 0 and "step 1/2  reward 0.5" in result.stdout
    result = runner.invoke(cli.app, ["k8s", "logs", "-n", "team", "--context", "prod"])
    assert (result.exit_code, result.stdout) == (0, "step 1/2  reward 0.5\n")
    assert programs.calls()[-1][:5] == ["kubectl", "--context", "prod", "-n", "team"]


@pytest.mark.parametrize(
    ("verb", "status", "code"),
    [
        (["logs"], {}, 10),
        (["logs"], DONE, 2),
        (["logs", "-f"], DONE, 0),
        (["logs", "-f"], BAD, 10),
        (["fetch", "OUT"], RUNNING, 10),
        (["fetch", "OUT"], BAD, 19),
        (["stop"], DONE, 2),
        (["status"], BAD, 0),
    ],
)
def test_exit_codes(verb: list[str], status: dict[str, str], code: int, programs: Programs, in_tmp: Path) -> None:
    programs.items("get rayjobs", [job("mine", **status)])
    programs.items("get pods", [])
    result = runner.invoke(cli.app, ["k8s", *verb])
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") == (code != 0) and result.stderr.count("\n") == (code != 0)


@pytest.mark.parametrize("verb", [["status"], ["logs"], ["logs", "-f"], ["fetch", "OUT"], ["stop"]])
def test_without_kubectl_a_cluster_or_a_release_each_verb_is_a_sentence(
    verb: list[str], programs: Programs, in_tmp: Path
) -> None:
    programs.answer("config view", {"out": "team"})
    programs.items("get rayjobs", [])
    result = runner.invoke(cli.app, ["k8s", *verb])
    assert result.exit_code == 2 and "a release of the chart must be in namespace team" in result.stderr
    programs.items("get rayjobs", [job("a"), job("b")])
    result = runner.invoke(cli.app, ["k8s", *verb])
    assert result.exit_code == 2 and "has several: a, b" in result.stderr
    programs.answer("get rayjobs", {"err": "dial tcp 10.0.0.1:6443: connect: connection refused", "code": 1})
    result = runner.invoke(cli.app, ["k8s", *verb])
    assert result.exit_code == 10 and "the cluster must answer" in result.stderr
    (programs.folder / "kubectl").unlink()
    result = runner.invoke(cli.app, ["k8s", *verb])
    assert result.exit_code == 2 and "kubectl must be on the PATH" in result.stderr
    assert list(in_tmp.iterdir()) == [programs.folder]


def test_the_file_of_a_run_names_its_release(programs: Programs, in_tmp: Path) -> None:
    Path("run.yaml").write_text("run: {name: my-run}\nmodel: {path: ./x}\ndata: {source: arithmetic}\n")
    programs.items("get rayjobs", [job("other"), job("my-run", **DONE)])
    programs.items("get pods", [])
    result = runner.invoke(cli.app, ["k8s", "status", "run.yaml"])
    assert result.exit_code == 0 and "of release my-run: Complete SUCCEEDED" in result.stdout
    result = runner.invoke(cli.app, ["k8s", "status", "none.yaml"])
    assert result.exit_code == 2 and "none.yaml: cannot be read" in result.stderr


def test_a_log_whose_reader_has_gone_is_not_followed(programs: Programs, tmp_path: Path) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)])
    programs.items("get pods", [pod("head")])
    lines = [{"out": f"2026-01-01T00:00:0{n}Z step {n}/9\n"} for n in range(1, 9)]
    first = f"2026-01-01T00:00:00Z {BANNER}\n2026-01-01T00:00:00Z step 0/9\n"
    programs.answer("logs", {"out": first}, *lines)
    code = "import sys; from grpo.cli import main; main()"
    command = [sys.executable, "-c", code, "k8s", "logs", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) as child:
        try:
            assert child.stdout and child.stdout.readline() == b"step 0/9\n"
            child.stdout.close()
            assert child.wait(timeout=60) == 0
        finally:
            child.kill()
