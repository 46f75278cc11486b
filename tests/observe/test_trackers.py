import json
import math
import os
import struct
import sys
import threading
import time
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.config.text import first_line
from grpo.errors import ConfigError, RewardError
from grpo.observe import tracking
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

    def init(self, project, name, dir, config, id, resume):
        self.calls.append(("init", project, name, config["run"]["steps"], id, resume))
        return types.SimpleNamespace(
            id=id or "made-1",
            define_metric=lambda *args, **kwargs: self.calls.append(("define", *args, *kwargs.values())),
            log=lambda row: self.calls.append(("log", row["step"], row["reward/mean"])),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


AXIS = [("define", "step"), ("define", "*", "step")]


def test_wandb_gets_every_row_and_the_outcome_and_goes_on_with_its_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with make_recorder(tmp_path / "run", metrics={"wandb_project": "mine"}) as recorder:
        log_step(recorder, 1)
    with pytest.raises(RewardError), make_recorder(tmp_path / "run", metrics={"wandb_project": "mine"}) as recorder:
        log_step(recorder, 1)  # made again: not dropped
        raise RewardError("x")
    first, again = (("init", "mine", "fake", 3, *known) for known in ((None, None), ("made-1", "allow")))
    logged = ("log", 1, 0.5)
    assert wandb.calls == [first, *AXIS, logged, ("finish", 0), again, *AXIS, logged, ("finish", 1)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"wandb": 3}', '{"wandb": "../x"}', "[" * 99_999, None])
def test_a_damaged_file_of_ids_begins_a_new_run(tmp_path, monkeypatch, damage):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "trackers.json").write_text(damage) if damage else os.mkfifo(tmp_path / "trackers.json")
    with make_recorder(tmp_path, metrics={"wandb_project": "mine"}):
        pass
    assert wandb.calls[0][-2:] == (None, None)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "made-1"}


class FakeMlflow(types.ModuleType):
    """The module and its client in one."""

    exceptions = types.SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))
    entities = types.SimpleNamespace(
        Param=lambda key, value: (key, value), Metric=lambda key, value, at, step: (key, value, step)
    )

    def __init__(self):
        super().__init__("mlflow")
        self.calls = []

    def MlflowClient(self, tracking_uri):
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "e1"

    def create_run(self, experiment, run_name):
        self.calls.append(("create_run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, run, status):
        self.calls.append(("update_run", run, status))

    def log_batch(self, run, metrics=(), params=(), synchronous=True):
        self.calls.append(("params", dict(params)) if params else ("log", run, list(metrics)))
        return types.SimpleNamespace(wait=lambda: self.calls.append(("wait",)))

    def set_terminated(self, run, status):
        self.calls.append(("end", run, status))


@pytest.fixture
def mlflow(monkeypatch):
    module = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", module.entities)
    return module


def test_mlflow_gets_names_it_allows_and_finite_numbers_and_goes_on_with_its_run(tmp_path, mlflow):
    for _ in range(2):
        with (
            make_recorder(tmp_path / "run", metrics={"mlflow_uri": "file:/x"}) as recorder,
            recorder.phase("eval"),
        ):
            odd = {"reward/function/http://judge:8000/v1 (m+)": 1.0}
            recorder.log_eval(2, [], {"eval/pass@4": 0.5, "eval/accuracy": math.nan} | odd)
    params = {key: value for name, *rest in mlflow.calls if name == "params" for key, value in rest[0].items()}
    assert params["run.steps"] == "3"
    calls = [call for call in mlflow.calls if call[0] != "params"]
    logged = calls[1]
    assert logged[:2] == ("log", "r1") and {(key, step) for key, _, step in logged[2]} == {
        ("eval/pass_at_4", 2),
        ("reward/function/http:/judge:8000/v1 _m__", 2),
        ("phase/eval", 2),
    }
    assert [call[:2] for call in calls[:1]] == [("create_run", "e1")]
    assert calls[2:5] == [("wait",), ("end", "r1", "FINISHED"), ("update_run", "r1", "RUNNING")]
    assert [call[0] for call in calls[5:]] == ["log", "wait", "end"]


ANYTHING = [OSError(28, "No space left on device"), ValueError("x"), KeyError("y"), SystemExit(3), MemoryError()]


@pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
def test_whatever_a_tracker_raises_is_told_once_and_counted_and_the_run_goes_on(tmp_path, monkeypatch, error, mlflow):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def refuse(*_, **__):
        raise error

    mlflow.log_batch = lambda *_, params=(), **__: None if params else refuse()
    mlflow.set_terminated = refuse
    recorder = make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x", "wandb_project": "p"})
    said = []
    monkeypatch.setattr(recorder._tracking, "_say", said.append)
    with recorder:
        for step in (1, 2):
            log_step(recorder, step)
        assert failures(recorder) == {"MLflow": 2, "W&B": 0, "TensorBoard": 0}
    assert [line.split(";")[0] for line in said] == [
        f"warning: MLflow has failed ({type(error).__name__}: {first_line(error)})"
    ]
    assert failures(recorder)["MLflow"] == 3
    assert [row["event"] for row in rows_of(tmp_path / "run")] == ["start", "step", "step", "end"]
    assert [call for call in wandb.calls if call[0] in ("log", "finish")] == [
        *(("log", 1, 0.5), ("log", 2, 0.5)),
        ("finish", 0),
    ]


def failures(recorder):
    found = recorder._prometheus.registry
    names = ("TensorBoard", "W&B", "MLflow")
    labels = ({"run": "fake", "tracker": name} for name in names)
    values = (found.get_sample_value("grpo_tracker_failures_total", label) for label in labels)
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("error", ANYTHING, ids=lambda error: type(error).__name__)
def test_a_service_that_refuses_is_a_config_error_once_and_later_only_told(tmp_path, mlflow, error):
    def refuse(*_, **__):
        raise error

    create_run, mlflow.create_run = mlflow.create_run, refuse
    recorder = make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x"})
    with pytest.raises(ConfigError, match="metrics.mlflow_uri: MLflow must accept the run, but says: "), recorder:
        pass
    mlflow.create_run = create_run
    with make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x"}):
        pass
    mlflow.update_run = refuse
    with make_recorder(tmp_path / "run", metrics={"mlflow_uri": "http://x"}) as recorder:
        log_step(recorder, 1)
        assert failures(recorder)["MLflow"] == 1
    assert rows_of(tmp_path / "run")[-1]["outcome"] == "ok"


def test_a_service_that_never_answers_at_the_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    wandb, over = FakeWandb(), threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    init = wandb.init

    def slow(**named):
        run = init(**named)
        run.finish = lambda exit_code: over.wait(60)
        return run

    wandb.init = slow
    with make_recorder(tmp_path / "run", metrics={"wandb_project": "p"}):
        pass
    over.set()
    assert rows_of(tmp_path / "run")[-1]["outcome"] == "ok"


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return [event.step for event in events.Tensors("reward/mean")]


@pytest.mark.parametrize("part", [0, 7])
def test_tensorboard_on_a_full_disk_leaves_rows_out_and_goes_on(tmp_path, monkeypatch, part, capfd):
    write = os.write

    def full(file, data):
        if part:  # as much as there is room for
            write(file, data[:part])
        raise OSError(28, "No space left on device")

    with make_recorder(tmp_path / "run") as recorder:
        log_step(recorder, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            log_step(recorder, 2)
            log_step(recorder, 3)
        log_step(recorder, 4)
        assert failures(recorder)["TensorBoard"] == 2
    assert scalars(tmp_path / "run/tensorboard") == [1, 4]
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_in_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with make_recorder(tmp_path) as recorder:
        log_step(recorder, 1)
        assert failures(recorder)["TensorBoard"] == 1
    assert rows_of(tmp_path)[-1]["outcome"] == "ok"


def test_the_real_wandb_keeps_one_run_and_every_row(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb, an optional package, is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in ((1, 2, 3), (2, 3)):  # the second start makes two of them again
        with make_recorder(tmp_path / "run", metrics={"wandb_project": "mine"}) as recorder:
            for step in steps:
                log_step(recorder, step)
        time.sleep(1.1)  # W&B names folders by the second
    known = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert files and all(known in file.name for file in files)
    assert wandb_steps(files) == [1, 2, 3, 2, 3]


def wandb_steps(files):
    """The own axis, as W&B's files hold it: a log of LevelDB's kind behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for file in files:
        data, place, text = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            text = (b"" if kind in (1, 2) else text) + data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(text)
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                steps += [int(items["step"])] if "step" in items else []
    return steps


def test_the_real_mlflow_keeps_one_run_and_every_row(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="mlflow, an optional package, is not installed")
    uri = f"file:{tmp_path}/mlruns"
    for steps in ((1, 2, 3), (2, 3)):
        with make_recorder(tmp_path / "run", metrics={"mlflow_uri": uri}) as recorder:
            for step in steps:
                log_step(recorder, step)
    known = json.loads((tmp_path / "run/trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("grpo").experiment_id])
    assert (run.info.run_id, run.info.status) == (known, "FINISHED")
    assert sorted(point.step for point in client.get_metric_history(known, "reward/mean")) == [1, 2, 2, 3, 3]


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
