import math
import sys
import types

import pytest

from grpo.errors import ConfigError, RewardError
from grpo.observe.trackers import flatten
from tests.observe.recorders import log_step, make_recorder, rows_of


@pytest.mark.parametrize(
    ("metrics", "package", "install"),
    [
        ({"wandb_project": "p"}, "wandb", "pip install wandb"),
        ({"mlflow_uri": "file:x"}, "mlflow", "pip install mlflow-skinny"),
    ],
)
def test_a_missing_package_is_named_before_the_folder_is_used(tmp_path, monkeypatch, metrics, package, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=install), make_recorder(tmp_path / "run", metrics=metrics):
        pass
    with make_recorder(tmp_path / "run"):
        pass


class FakeWandb(types.ModuleType):
    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, project, name, dir, config):
        self.calls.append(("init", project, name, config["run"]["steps"]))
        return types.SimpleNamespace(
            log=lambda row, step: self.calls.append(("log", step, row["reward/mean"])),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


def test_wandb_gets_every_row_and_the_outcome(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with make_recorder(tmp_path / "run", metrics={"wandb_project": "mine"}) as recorder:
        log_step(recorder, 1)
    with pytest.raises(RewardError), make_recorder(tmp_path / "run2", metrics={"wandb_project": "mine"}):
        raise RewardError("x")
    start = ("init", "mine", "fake", 3)
    assert wandb.calls == [start, ("log", 1, 0.5), ("finish", 0), start, ("finish", 1)]


class FakeMlflow(types.ModuleType):
    exceptions = types.SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))

    def __init__(self):
        super().__init__("mlflow")
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def test_mlflow_gets_names_it_allows_and_finite_numbers(tmp_path, monkeypatch):
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with (
        make_recorder(tmp_path / "run", metrics={"mlflow_uri": "file:/x"}) as recorder,
        recorder.phase("eval"),
    ):
        recorder.log_eval(2, [], {"eval/pass@4": 0.5, "eval/accuracy": math.nan})
    names = [call[0] for call in mlflow.calls]
    assert names == ["set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    assert mlflow.calls[3][1]["run.steps"] == 3
    assert set(mlflow.calls[4][1]) == {"eval/pass_at_4", "phase/eval"}
    assert mlflow.calls[5] == ("end_run", "FINISHED")


def test_a_tracker_that_refuses_is_a_config_error(tmp_path, monkeypatch):
    mlflow = FakeMlflow()

    def refuse(name):
        raise mlflow.exceptions.MlflowException("no such server")

    mlflow.set_experiment = refuse
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with (
        pytest.raises(ConfigError, match="metrics.mlflow_uri.*no such server"),
        make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x"}),
    ):
        pass


def test_a_tracker_lost_at_the_end_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    mlflow = FakeMlflow()

    def refuse(status):
        raise mlflow.exceptions.MlflowException("server is gone")

    mlflow.end_run = refuse
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x"}):
        pass
    assert "server is gone" in caplog.text
    assert rows_of(tmp_path / "run")[-1]["outcome"] == "ok"


def test_a_password_in_the_uri_is_refused_without_showing_it(tmp_path):
    uri = "https://me:hunter2@mlflow.example"
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught,
        make_recorder(tmp_path / "run", metrics={"mlflow_uri": uri}),
    ):
        pass
    assert "hunter2" not in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_flatten():
    assert flatten({"run": {"steps": 3, "deep": {"a": None}}, "x": [1]}) == {
        "run.steps": 3,
        "run.deep": {"a": None},
        "x": [1],
    }
