import json
import re
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import yaml
from prometheus_client import generate_latest

from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, RewardError
from grpo.observe.health import Health
from grpo.observe.recorder import RunRecorder
from grpo.observe.report import write_report
from grpo.observe.rows import read_rows
from grpo.observe.server import serving
from tests.observe.recorders import log_step, make_recorder, rewound, rows_of
from tests.runs import make_config, make_group, make_stats, quiet_progress, write_run


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


def test_a_recovery_outlives_going_back(tmp_path):
    rewound(tmp_path, recovery=2.5)
    row = next(row for row in rows_of(tmp_path) if row["event"] == "recovery")
    assert (row["role"], row["cause"], row["recovery/seconds"]) == ("rollout", "lost", 2.5)
    assert [row["event"] for row in rows_of(tmp_path)] == ["start", "step", "step", "recovery", "step", "end"]


def test_engines_that_come_and_go_are_told_everywhere(tmp_path):
    with make_recorder(tmp_path) as recorder:
        recorder.rewind(0, {})
        recorder.engines(3, 2, 1)
        recorder.engine("joined", "engine 1")
        log_step(recorder, 1)
        recorder.rewind(0, {})
        shown = generate_latest(recorder._prometheus.registry).decode()
    rows = rows_of(tmp_path)
    assert [(row["what"], row["engine"]) for row in rows if row["event"] == "engine"] == [("joined", "engine 1")]
    lost = [json.loads(line) for line in (tmp_path / "superseded/metrics-0000.jsonl").read_text().splitlines()]
    assert [row["pipeline/engines"] for row in lost] == [2.0]
    for state, count in (("wanted", 3), ("healthy", 2), ("joining", 1)):
        assert re.search(rf'grpo_engines{{run="[^"]*",state="{state}"}} {count}.0', shown)
    assert re.search(r'grpo_engine_events_total{event="joined",run="[^"]*"} 1.0', shown)


def test_a_recovery_outlives_a_commit_that_held_it_and_failed(tmp_path):
    with make_recorder(tmp_path) as recorder:
        recorder.rewind(0, {})
        log_step(recorder, 1)
        whole = recorder.attachments()
        recorder.recovered("rollout", ClusterError("lost"), 2.5)
        log_step(recorder, 2)
        for attachments in (whole, recorder.attachments(), whole):
            recorder.rewind(1, attachments)
            assert [row["event"] for row in rows_of(tmp_path)].count("recovery") == 1
    events = [row["event"] for row in rows_of(tmp_path)]
    assert events == ["start", "step", "recovery", "end"]


def test_gauges_show_the_last_step_of_the_checkpoint_again(tmp_path):
    attachments = rewound(tmp_path)
    with make_recorder(tmp_path, metrics={"port": 0}) as recorder:
        recorder.rewind(2, attachments)
        page = scrape(recorder.port)
    assert 'grpo_step{run="fake"} 2.0' in page and 'grpo_reward_mean{run="fake"} 0.5' in page
    assert 'grpo_steps_total{outcome="ok",run="fake"} 0.0' in page


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
        "grpo.observe.server.serving", lambda host, *rest: hosts.append(host) or serving("127.0.0.1", *rest)
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


def test_samples_say_what_the_model_saw(tmp_path):
    """The prompt is decoded from its ids, and a group of a named source says which."""
    group = make_group([1.0, 0.0], 1)
    named = replace(group, prompt=replace(group.prompt, source="sums"))
    run = make_config()
    made = RunRecorder(run, tmp_path / "run", quiet_progress(run), decode=lambda ids: f"<s>{len(ids)} tokens")
    with made as recorder, recorder.step(1):
        recorder.log_step(1, [group, named], make_stats(1))
    plain, sourced = read_rows(tmp_path / "run/samples.jsonl")
    assert plain["prompt"] == sourced["prompt"] == f"<s>{len(group.prompt.token_ids)} tokens"
    assert "source" not in plain and sourced["source"] == "sums"
    assert "What the model saw" in write_report(tmp_path / "run").read_text()
