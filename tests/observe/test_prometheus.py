import math
import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest

from grpo.observe.metrics import CATALOGUE, PHASES, summarize
from grpo.observe.prometheus import PrometheusMetrics
from grpo.rewards.process import KINDS, SERVICE_KINDS
from tests.runs import SYNC, make_config, make_group, make_stats


def make_metrics():
    return PrometheusMetrics("fake", "0.1.0", "models/tiny", "dapo")


def series(metrics):
    """{'grpo_step{run="fake"}': 3.0, …} as a scrape sees it."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_record_sets_gauges_adds_counters_and_observes_histograms():
    metrics = make_metrics()
    for loss in (0.5, 0.25):
        metrics.record({"train/loss": loss, "train/tokens": 100.0, "phase/rollout": 2.0, "eval/pass@4": 0.5})
    found = series(metrics)
    assert found['grpo_loss{run="fake"}'] == 0.25
    assert found['grpo_train_tokens_total{run="fake"}'] == 200
    assert found['grpo_phase_duration_seconds_sum{phase="rollout",run="fake"}'] == 4.0
    assert found['grpo_phase_duration_seconds_count{phase="rollout",run="fake"}'] == 2
    assert found['grpo_phase_duration_seconds_bucket{le="1.0",phase="rollout",run="fake"}'] == 0
    assert found['grpo_eval_score{metric="pass@4",run="fake"}'] == 0.5


def test_numbers_that_are_not_finite_reach_gauges_only():
    metrics = make_metrics()
    metrics.record({"train/loss": math.nan, "train/tokens": math.nan, "sync/seconds": math.inf})
    found = series(metrics)
    assert math.isnan(found['grpo_loss{run="fake"}'])
    assert 'grpo_weight_sync_duration_seconds_count{run="fake"}' not in found


def test_record_samples():
    metrics = make_metrics()
    metrics.record_samples([make_group([1.0, 0.0, -1.0], step=3, truncated=2)], step=4)
    found = series(metrics)
    assert found['grpo_reward_count{run="fake"}'] == 3
    assert found['grpo_reward_sum{run="fake"}'] == 0.0
    assert found['grpo_reward_bucket{le="0.0",run="fake"}'] == 2
    assert found['grpo_completion_tokens_sum{run="fake"}'] == 10 + 11 + 12
    assert found['grpo_completion_truncated_total{run="fake"}'] == 2
    assert found['grpo_sample_staleness_steps_sum{run="fake"}'] == 3


def test_phases_and_failures():
    metrics = make_metrics()
    assert [series(metrics)[f'grpo_phase{{phase="{phase}",run="fake"}}'] for phase in PHASES] == [0.0] * len(PHASES)
    metrics.phase_started("checkpoint")
    assert series(metrics)['grpo_phase{phase="checkpoint",run="fake"}'] == 1
    metrics.phase_ended("checkpoint", ok=False)
    metrics.phase_ended("weight_sync", ok=True)  # it may only have begun a sync beside the steps
    metrics.sync_ended(ok=True)
    metrics.step_ended(ok=False)
    found = series(metrics)
    assert found['grpo_phase{phase="checkpoint",run="fake"}'] == 0
    assert found['grpo_checkpoint_failures_total{run="fake"}'] == 1
    assert 'grpo_checkpoint_last_success_timestamp_seconds{run="fake"}' not in found
    assert found['grpo_weight_sync_total{result="ok",run="fake"}'] == 1
    assert found['grpo_weight_sync_total{result="error",run="fake"}'] == 0
    assert found['grpo_steps_total{outcome="failed",run="fake"}'] == 1


def test_what_is_known_before_the_first_step(monkeypatch):
    monkeypatch.setattr("grpo.observe.prometheus.time.time", lambda: 1.8e9)
    metrics = make_metrics()
    metrics.start(make_config(rollout={"engines": 3}, train={"ranks": 2}, checkpoint={"every": 5}), attempt=2)
    found = series(metrics)
    workers = {name: value for name, value in found.items() if name.startswith("grpo_workers")}
    assert workers == {
        'grpo_workers{role="rollout",run="fake",state="expected"}': 3,
        'grpo_workers{role="rollout",run="fake",state="ready"}': 0,
        'grpo_workers{role="rollout",run="fake",state="lost"}': 0,
        'grpo_workers{role="trainer",run="fake",state="expected"}': 2,
        'grpo_workers{role="trainer",run="fake",state="ready"}': 0,
        'grpo_workers{role="trainer",run="fake",state="lost"}': 0,
    }
    assert found['grpo_run_steps{run="fake"}'] == 3
    assert found['grpo_checkpoint_every_steps{run="fake"}'] == 5
    assert found['grpo_attempt{run="fake"}'] == 2
    assert found['grpo_progress_timestamp_seconds{run="fake"}'] == 1.8e9


def test_a_counter_is_0_before_its_first_event():
    """Without the 0 a dashboard has no data, and the first failure is no increase that an alert could see."""
    found = series(make_metrics())
    counters = [metric for metric in CATALOGUE if metric.kind == "counter" and "*" not in metric.keys.values()]
    assert len(counters) > 12
    for metric in counters:
        values = {name: value for name, value in found.items() if name.startswith(f"{metric.name}{{")}
        assert values and set(values.values()) <= {0.0} or metric.name == "grpo_phase_seconds_total", metric.name
    kinds = {name for name in found if name.startswith("grpo_reward_failures_total")}
    assert kinds == {f'grpo_reward_failures_total{{kind="{kind}",run="fake"}}' for kind in (*KINDS, *SERVICE_KINDS)}


def test_when_a_start_and_a_recovery_were(monkeypatch):
    monkeypatch.setattr("grpo.observe.prometheus.time.time", lambda: 1.8e9)
    metrics = make_metrics()
    assert series(metrics)['grpo_start_timestamp_seconds{run="fake"}'] == 1.8e9
    assert 'grpo_recovery_timestamp_seconds{role="rollout",run="fake"}' not in series(metrics)
    monkeypatch.setattr("grpo.observe.prometheus.time.time", lambda: 1.9e9)
    metrics.recovered("rollout", 3.0)
    assert series(metrics)['grpo_recovery_timestamp_seconds{role="rollout",run="fake"}'] == 1.9e9


def test_checkpoints_and_going_back_to_them():
    metrics = make_metrics()
    metrics.rewound(0)
    metrics.committed(4, size=1234)
    found = series(metrics)
    assert found['grpo_resumed_step{run="fake"}'] == 0
    assert (found['grpo_checkpoint_step{run="fake"}'], found['grpo_checkpoint_size_bytes{run="fake"}']) == (4, 1234)
    metrics.committed(8, size=1236)
    metrics.rewound(4)  # the newest was damaged
    found = series(metrics)
    assert (found['grpo_checkpoint_step{run="fake"}'], found['grpo_resumed_step{run="fake"}']) == (4, 4)


def full_step(metrics, step):
    if step == 1:
        metrics.start(make_config(), attempt=2)
    metrics.recovered("trainer", 4.0)
    metrics.started("trainer", [{"imports": 2.0, "weights": 1.0}])
    metrics.checkpoint_skipped()
    metrics.rewound(step - 1)
    metrics.workers("rollout", ready=1, lost=0)
    metrics.engines(wanted=3, healthy=1, joining=1)
    metrics.engine_event("joined")
    metrics.policy_version("rollout", step)
    metrics.committed(step, size=1000)
    for phase in PHASES:
        metrics.phase_started(phase)
        metrics.phase_ended(phase, ok=True)
    groups = [make_group([1.0, 0.0], step)]
    scores = {"eval/accuracy": 0.5, "eval/pass@4": 0.6, "train/kl_reference": 0.1, "sync/self_test_diff": 0.0} | SYNC
    scores["train/kl_coef"] = 0.02
    failed = {"train/skipped": 1.0, "reward/failures_timeout": 1.0, "reward/dropped_samples": 1.0}
    failed |= {"reward/source/math": 0.5, "reward/function/my_rewards:short": 0.25}
    failed |= {"pipeline/rollout_idle": 0.1, "pipeline/trainer_idle": 0.2, "pipeline/batches_ahead": 1.0}
    failed |= {"rollout/skipped_ratio": 0.5, "pipeline/engines": 1.0, "pipeline/queue_seconds": 2.0}
    failed |= {"curriculum/skipped_easy": 0.2, "curriculum/skipped_hard": 0.0}
    parts = ("connect", "self_test", "publish", "receive", "switch")
    failed |= {f"sync/{part}_seconds": 0.1 for part in parts} | {"sync/snapshot_bytes": 9.0}
    failed |= {"checkpoint/stall_seconds": 0.1, "checkpoint/durable_seconds": 2.0}
    failed |= {"reward/dropped_groups": 0.0, "reward/requests": 2.0, "reward/retries": 0.0, "reward/cached": 1.0}
    timed = {f"phase/{phase}": 0.5 for phase in PHASES} | {"step/seconds": 3.0, "step/tokens_per_second": 7.0}
    metrics.record(make_stats(step) | summarize(groups, step) | scores | failed | timed | {"step": step, "time": 1.8e9})
    metrics.record_samples(groups, step)
    metrics.step_ended(ok=True)


def test_every_metric_of_the_catalogue_is_filled():
    metrics = make_metrics()
    full_step(metrics, 1)
    filled = {re.sub(r"_(bucket|sum|count)$", "", name.split("{")[0]) for name in series(metrics)}
    assert filled == {metric.name for metric in CATALOGUE}
    assert all('run="fake"' in name for name in series(metrics))


def test_the_number_of_series_is_constant_and_small():
    metrics = make_metrics()
    full_step(metrics, 1)
    first = len(series(metrics))
    for step in range(2, 50):
        full_step(metrics, step)
    assert len(series(metrics)) == first < 350


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_finds_nothing_to_complain_about():
    metrics = make_metrics()
    full_step(metrics, 1)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
