import json
import math
import sys
import types
import urllib.error
import urllib.request

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.config import Config
from grpo.errors import CheckpointError, ClusterError, ConfigError, RewardError
from grpo.observe.folder import read_rows
from grpo.observe.health import Health
from grpo.observe.recorder import RunRecorder
from grpo.observe.server import serving
from tests.runs import make_config, make_group, make_stats, quiet_progress, write_run


def make_recorder(run_dir, **sections):
    config = make_config(**sections)
    return RunRecorder(config, run_dir, quiet_progress(config), ["grpo", "train", "a b.yaml"])


def log_step(recorder, step, stats=None, rewards_G=(1.0, 0.0)):
    with recorder.step(step), recorder.phase("rollout"):
        pass
        recorder.log_step(step, [make_group(rewards_G, step)], stats or make_stats(step))


def rows_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def scrape(port):
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


class Clock:
    """perf_counter that goes forward by what it is told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("grpo.observe.recorder.time.perf_counter", lambda: self.now)


def test_rows_come_in_the_order_of_the_run(tmp_path):
    write_run(tmp_path / "run", steps=3, eval_every=2)
    events = [(row["event"], row["step"]) for row in rows_of(tmp_path / "run")]
    assert events == [
        ("start", 0),
        ("weight_sync", 0),
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("eval", 3),
        ("end", 3),
    ]


def test_a_step_has_one_row_with_the_times_of_its_phases(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with make_recorder(tmp_path / "run") as recorder:
        with recorder.step(1):
            with recorder.phase("rollout"):
                clock.now += 1.5
            with recorder.phase("weight_sync"):
                clock.now += 0.25
            with recorder.phase("weight_sync"):
                clock.now += 0.25
            clock.now += 2.0
            recorder.log_step(1, [make_group([1.0, 0.0])], {"train/loss": 0.5})
        with recorder.phase("checkpoint"):
            clock.now += 4.0
    _, step, checkpoint, _ = rows_of(tmp_path / "run")
    assert {key: step[key] for key in step if key.startswith("phase/")} == {
        "phase/rollout": 1.5,
        "phase/weight_sync": 0.5,
    }
    assert (step["step/seconds"], step["step/tokens_per_second"]) == (4.0, 21 / 4.0)
    assert (step["train/loss"], step["reward/mean"], step["completion/tokens"]) == (0.5, 0.5, 10.5)
    assert (checkpoint["event"], checkpoint["step"], checkpoint["phase/checkpoint"]) == ("checkpoint", 1, 4.0)
    assert "step/seconds" not in checkpoint


def test_an_evaluation_has_one_row(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with make_recorder(tmp_path / "run") as recorder, recorder.phase("eval"):
        clock.now += 3.0
        recorder.log_eval(7, [make_group([1.0])], {"eval/accuracy": 0.25, "eval/pass@4": 0.5})
    row = rows_of(tmp_path / "run")[1]
    del row["time"]
    assert row == {"event": "eval", "step": 7, "eval/accuracy": 0.25, "eval/pass@4": 0.5, "phase/eval": 3.0}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with make_recorder(tmp_path / "run") as recorder:
        log_step(recorder, 1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/entropy": 1.0})
    row = rows_of(tmp_path / "run")[1]
    assert (row["train/loss"], row["train/grad_norm"], row["train/entropy"]) == (None, None, 1.0)


def test_rows_are_there_while_the_run_goes_on(tmp_path):
    with make_recorder(tmp_path / "run") as recorder:
        log_step(recorder, 1)
        assert [row["event"] for row in rows_of(tmp_path / "run")] == ["start", "step"]
        assert len(rows_of(tmp_path / "run", "samples.jsonl")) == 1


def test_a_step_that_fails_has_no_row_and_the_end_says_why(tmp_path):
    with (
        pytest.raises(RewardError),
        make_recorder(tmp_path / "run", metrics={"port": 0}) as recorder,
    ):
        log_step(recorder, 1)
        try:
            with recorder.step(2), recorder.phase("reward"):
                raise RewardError("reward went wrong")
        finally:
            page = scrape(recorder.port)
    assert 'grpo_steps_total{outcome="failed",run="fake"} 1.0' in page
    assert 'grpo_steps_total{outcome="ok",run="fake"} 1.0' in page
    assert 'grpo_phase{phase="reward",run="fake"} 0.0' in page
    _, step, end = rows_of(tmp_path / "run")
    assert (step["event"], step["step"]) == ("step", 1)
    assert (end["event"], end["outcome"], end["message"]) == ("end", "RewardError", "reward went wrong")


def test_what_failed_does_not_leak_into_the_next_row(tmp_path):
    with make_recorder(tmp_path / "run") as recorder:
        with pytest.raises(RewardError), recorder.step(1):
            with recorder.phase("rollout"):
                pass
            raise RewardError("lost")
        with recorder.phase("checkpoint"):
            pass
    assert set(rows_of(tmp_path / "run")[1]) == {"event", "step", "time", "phase/checkpoint"}


def test_an_unknown_key_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="train/typo"), make_recorder(tmp_path / "run") as recorder:
        log_step(recorder, 1, {"train/typo": 1.0})


def test_the_start_row_holds_the_command(tmp_path):
    with make_recorder(tmp_path / "run"):
        pass
    assert rows_of(tmp_path / "run")[0]["command"] == "grpo train 'a b.yaml'"


def test_the_resolved_config_is_written_and_reads_back(tmp_path):
    recorder = make_recorder(tmp_path / "run", train={"learning_rate": 2e-6})
    with recorder:
        pass
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["train"]["learning_rate"] == 2e-6
    assert Config.model_validate(written) == recorder.config


def test_samples_keep_the_first_groups_of_a_step(tmp_path):
    groups = [make_group([1.0, 0.0], row=row, text="text", truncated=1) for row in range(5)]
    with (
        make_recorder(tmp_path / "run", metrics={"completions_per_step": 2}) as recorder,
        recorder.step(1),
        recorder.phase("rollout"),
    ):
        recorder.log_step(1, groups, make_stats(1))
    rows = rows_of(tmp_path / "run", "samples.jsonl")
    assert [row["prompt_id"] for row in rows] == ["fake:0", "fake:1"]
    assert rows[0] == {
        "event": "step",
        "step": 1,
        "prompt_id": "fake:0",
        "question": "Question 0: what is 2 + 2?",
        "answer": "4",
        "completions": ["text (0)", "text (1)"],
        "rewards": [1.0, 0.0],
        "finish_reasons": ["length", "stop"],
        "versions": [0, 0],
    }


def test_tensorboard_shows_the_same_numbers(tmp_path):
    write_run(tmp_path / "run", steps=3, eval_every=3)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    rows = rows_of(tmp_path / "run")
    numbers = {key for row in rows for key, value in row.items() if "/" in key and value is not None}
    assert set(events.Tags()["tensors"]) == numbers
    for key in ("reward/mean", "eval/accuracy", "phase/train"):
        shown = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(key)]
        assert shown == [(row["step"], pytest.approx(row[key])) for row in rows if key in row]


@pytest.mark.parametrize("trace", ["metrics.jsonl", "config.yaml", "samples.jsonl", "checkpoints/"])
def test_a_folder_that_holds_a_run_is_refused_and_untouched_if_the_user_says_so(tmp_path, trace):
    (tmp_path / trace).mkdir() if trace.endswith("/") else (tmp_path / trace).write_text("kept")
    recorder = make_recorder(tmp_path, run={"name": "fake", "steps": 3, "resume": "never"})
    with pytest.raises(ConfigError, match=f"run.dir.*never.*{trace.strip('/')}.*auto"), recorder:
        pass
    assert [path.name for path in tmp_path.iterdir()] == [trace.strip("/")]
    assert trace.endswith("/") or (tmp_path / trace).read_text() == "kept"


def rewound(run_dir, kept=2, steps=4, recovery=None):
    """A start that made steps and goes back to the checkpoint that it took after `kept` of them."""
    with make_recorder(run_dir) as recorder:
        recorder.rewind(0, {})
        for step in range(1, steps + 1):
            log_step(recorder, step)
            if step == kept:
                attachments = recorder.attachments()
        if recovery:
            recorder.recovered("rollout", ClusterError("lost"), recovery)
        recorder.rewind(kept, attachments)
        log_step(recorder, kept + 1, rewards_G=(1.0, 1.0))
    return attachments


def test_going_back_takes_rows_and_samples_and_scalars_of_the_lost_steps_out(tmp_path):
    rewound(tmp_path)
    assert [(row["event"], row["step"]) for row in rows_of(tmp_path)] == [
        *(("start", 0), ("step", 1), ("step", 2)),
        *(("step", 3), ("end", 3)),
    ]
    assert rows_of(tmp_path)[3]["reward/mean"] == 1.0
    assert [row["step"] for row in rows_of(tmp_path, "samples.jsonl")] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("reward/mean")] == [1, 2, 3]


def test_rows_that_are_taken_out_are_kept_elsewhere(tmp_path):
    rewound(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path, "superseded/metrics-0000.jsonl")] == [3, 4]
    assert [row["step"] for row in rows_of(tmp_path, "superseded/samples-0000.jsonl")] == [3, 4]


def test_a_recovery_outlives_going_back(tmp_path):
    rewound(tmp_path, recovery=2.5)
    row = next(row for row in rows_of(tmp_path) if row["event"] == "recovery")
    assert (row["role"], row["cause"], row["recovery/seconds"]) == ("rollout", "lost", 2.5)
    assert [row["event"] for row in rows_of(tmp_path)] == ["start", "step", "step", "recovery", "step", "end"]


def test_the_next_start_goes_on_with_the_rows_of_the_checkpoint_and_an_older_writer_is_cut_off(tmp_path):
    with make_recorder(tmp_path) as zombie:
        zombie.rewind(0, {})
        log_step(zombie, 1)
        attachments = zombie.attachments()
        log_step(zombie, 2)
        recorder = RunRecorder(make_config(), tmp_path, quiet_progress(make_config()), ["grpo"], attempt=2)
        with recorder:
            recorder.rewind(1, attachments)
            log_step(zombie, 3)
            log_step(recorder, 2)
        rows = [(row["event"], row["step"], row.get("attempt")) for row in rows_of(tmp_path)]
    assert rows == [("start", 0, "1"), ("step", 1, None), ("start", 0, "2"), ("step", 2, None), ("end", 2, None)]


def test_gauges_show_the_last_step_of_the_checkpoint_again(tmp_path):
    attachments = rewound(tmp_path)
    with make_recorder(tmp_path, metrics={"port": 0}) as recorder:
        recorder.rewind(2, attachments)
        page = scrape(recorder.port)
    assert 'grpo_step{run="fake"} 2.0' in page and 'grpo_reward_mean{run="fake"} 0.5' in page
    assert 'grpo_steps_total{outcome="ok",run="fake"} 0.0' in page


def test_two_runs_have_equal_digests_where_they_did_the_same(tmp_path):
    for name, rewards_G in (("a", (1.0, 0.0)), ("b", (1.0, 0.0)), ("c", (1.0, 0.0, 0.0))):
        with make_recorder(tmp_path / name) as recorder, recorder.step(1):
            with recorder.phase("weight_sync"):
                recorder.log_sync({}, "abcd")
            recorder.log_step(1, [make_group(rewards_G)], make_stats(1))
    a, b, c = (
        {key: row[key] for key in ("prompts", "tokens", "weights")}
        for row in (rows_of(tmp_path / name)[1] for name in "abc")
    )
    assert a == b and a["weights"] == "abcd"
    assert c["prompts"] == a["prompts"] and c["tokens"] != a["tokens"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="run.dir.*file/run"), make_recorder(tmp_path / "file/run"):
        pass


def test_a_full_disk_is_a_typed_error(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"), make_recorder(tmp_path / "run") as recorder:
        recorder._folder._metrics = Full()
        log_step(recorder, 1)


def test_prometheus_serves_while_the_run_goes_on(tmp_path):
    with make_recorder(tmp_path / "run", metrics={"port": 0}) as recorder:
        log_step(recorder, 1)
        with recorder.phase("train"):
            page = scrape(recorder.port)
    assert 'grpo_step{run="fake"} 1.0' in page
    assert 'grpo_phase{phase="train",run="fake"} 1.0' in page
    assert 'grpo_run_info{loss="dapo",model="models/tiny",run="fake"} 1.0' in page
    with pytest.raises(urllib.error.URLError):
        scrape(recorder.port)


def asked(port, path):
    try:
        with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_run_is_healthy_while_it_gets_on_and_ready_after_its_first_sync(tmp_path):
    now = [0.0]
    seen = []

    def look():
        seen.append((asked(recorder.port, "/healthz"), asked(recorder.port, "/readyz")))

    config = make_config(metrics={"port": 0})
    recorder = RunRecorder(config, tmp_path / "run", quiet_progress(config), ["grpo"])
    recorder.health = Health(config, now=lambda: now[0])
    with recorder:
        look()
        now[0] += 899
        recorder.workers("trainer", 1, 0)
        now[0] += 899
        look()
        with recorder.phase("weight_sync"):
            recorder.log_sync({}, "digest")
            assert recorder.health.health()[1].startswith("weight_sync: ")
        assert recorder.health.health()[1].startswith("between phases: ")
        look()
        with recorder.step(1), recorder.phase("reward"):
            now[0] += 300 + 900 + 60 + 1
            look()
            recorder.alive()
            look()
            recorder.log_step(1, [make_group([1.0, 0.0])], make_stats(1))
    assert seen == [(200, 503), (200, 503), (200, 200), (503, 200), (200, 200)]


def test_engines_ranks_versions_and_commits_show_at_once(tmp_path):
    with make_recorder(tmp_path / "run", metrics={"port": 0}, rollout={"engines": 2}) as recorder:
        recorder.workers("rollout", ready=1, lost=1)
        recorder.policy_version("trainer", 8)
        recorder.rewind(0, {})
        with recorder.phase("checkpoint"):
            recorder.log_commit(8, 1000)
            page = scrape(recorder.port)
    for line in (
        'grpo_workers{role="rollout",run="fake",state="expected"} 2.0',
        'grpo_workers{role="rollout",run="fake",state="ready"} 1.0',
        'grpo_workers{role="rollout",run="fake",state="lost"} 1.0',
        'grpo_policy_version{role="trainer",run="fake"} 8.0',
        'grpo_resumed_step{run="fake"} 0.0',
        'grpo_checkpoint_step{run="fake"} 8.0',
        'grpo_checkpoint_size_bytes{run="fake"} 1000.0',
    ):
        assert line in page


def every_sign(recorder):
    def phase():
        with recorder.phase("reward"):
            yield
        yield

    parts = phase()
    for sign in (
        lambda: next(parts),
        lambda: next(parts),
        lambda: recorder.workers("rollout", 1, 0),
        lambda: recorder.policy_version("rollout", 1),
        lambda: recorder.recovered("rollout", ClusterError("lost"), 1.0),
        recorder.attachments,
        recorder.alive,
    ):
        sign()
        yield


def test_whatever_gets_on_is_a_sign_of_progress(tmp_path, monkeypatch):
    clock = [1.8e9]
    monkeypatch.setattr("grpo.observe.prometheus.time.time", lambda: clock[0])
    with make_recorder(tmp_path / "run") as recorder:
        signs = every_sign(recorder)
        for _ in range(7):
            clock[0] += 1
            next(signs)
            found = recorder._prometheus.registry.get_sample_value("grpo_progress_timestamp_seconds", {"run": "fake"})
            assert found == clock[0]


@pytest.mark.parametrize(("address", "host"), [(None, "127.0.0.1"), ("auto", "0.0.0.0")])
def test_only_in_a_cluster_others_can_reach_it(tmp_path, monkeypatch, address, host):
    hosts = []
    monkeypatch.setattr(
        "grpo.observe.recorder.serving", lambda host, *rest: hosts.append(host) or serving("127.0.0.1", *rest)
    )
    with make_recorder(tmp_path / "run", metrics={"port": 0}, cluster={"address": address}):
        assert hosts == [host]


def test_no_port_serves_nothing(tmp_path):
    with make_recorder(tmp_path / "run") as recorder:
        assert recorder.port is None


def test_a_taken_port_is_refused_before_the_folder_is_used(tmp_path):
    with make_recorder(tmp_path / "a", metrics={"port": 0}) as first:
        taken = {"port": first.port}
        second = make_recorder(tmp_path / "b", metrics=taken)
        with pytest.raises(ConfigError, match=f"metrics.port.*{first.port}"), second:
            pass
    with make_recorder(tmp_path / "b", metrics=taken):
        pass


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


def test_read_rows_leaves_out_the_half_line_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"st', "[1]", "", "\x00\x00"])
def test_read_rows_names_a_damaged_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl:2"):
        list(read_rows(path))


def test_read_rows_of_no_file(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []
