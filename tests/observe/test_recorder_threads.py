"""Several threads tell the recorder what they do, while the main thread makes steps and commits them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo.errors import ClusterError, EngineLost, WeightSyncError
from grpo.observe.rows import read_rows
from tests.observe.recorders import log_step, make_recorder, rows_of
from tests.runs import make_group, make_stats


def events_of(run_dir):
    return [(row["event"], row["step"]) for row in rows_of(run_dir)]


def in_a_thread(verb, *arguments):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(verb, *arguments).result(30)


def test_a_version_and_a_commit_have_rows_of_their_own_in_the_middle_of_a_step(tmp_path):
    with make_recorder(tmp_path, metrics={"port": 0}) as recorder:
        with recorder.step(3), recorder.phase("train"):
            in_a_thread(recorder.log_version, 2, {"sync/bytes": 7.0, "sync/switch_seconds": 0.5}, "abc")
            in_a_thread(recorder.log_commit, 2, 1000, {"checkpoint/durable_seconds": 4.0})
            assert recorder.health.readiness() == (True, "ready")
            log_step_stats(recorder, 3)
        registry = recorder._prometheus.registry
        found = {
            name: registry.get_sample_value(name, {"run": "fake"} | labels)
            for name, labels in (
                ("grpo_weight_sync_total", {"result": "ok"}),
                ("grpo_weight_sync_bytes_total", {}),
                ("grpo_weight_sync_part_seconds", {"part": "switch"}),
                ("grpo_checkpoint_part_seconds", {"part": "durable"}),
                ("grpo_checkpoint_step", {}),
            )
        }
    assert list(found.values()) == [1.0, 7.0, 0.5, 4.0, 2.0]
    _, sync, commit, step, _ = rows_of(tmp_path)
    assert (sync["event"], sync["step"], sync["weights"], sync["sync/bytes"]) == ("weight_sync", 2, "abc", 7.0)
    assert (commit["event"], commit["step"], commit["checkpoint/durable_seconds"]) == ("commit", 2, 4.0)
    assert (step["event"], step["step"]) == ("step", 3)
    assert not {"sync/bytes", "weights", "checkpoint/durable_seconds"} & set(step)


def log_step_stats(recorder, step):
    recorder.log_step(step, [make_group([1.0, 0.0], step)], make_stats(step))


def test_lanes_of_other_threads_make_the_idle_shares_of_a_step(tmp_path):
    with make_recorder(tmp_path, rollout={"max_staleness": 1}) as recorder:
        begun, end = threading.Event(), threading.Event()

        def sample():
            with recorder.lane("rollout", "sample", 2):
                begun.set()
                assert end.wait(30)

        feeder = threading.Thread(target=sample)
        feeder.start()
        assert begun.wait(30)
        log_step(recorder, 1)
        end.set()
        feeder.join(30)
    row = rows_of(tmp_path)[1]
    assert (row["pipeline/rollout_idle"], row["pipeline/trainer_idle"]) == (0.0, 1.0)


def test_a_version_is_counted_once_when_the_engines_have_it(tmp_path):
    with make_recorder(tmp_path, rollout={"max_staleness": 1}, metrics={"port": 0}) as recorder:
        with recorder.phase("weight_sync"):
            recorder.log_sync({}, "zero")  # the first one comes all at once
        with recorder.phase("weight_sync"):
            recorder.log_sync({"sync/publish_seconds": 0.1}, "")
        registry, labels = recorder._prometheus.registry, {"run": "fake", "result": "ok"}
        before = registry.get_sample_value("grpo_weight_sync_total", labels)
        in_a_thread(recorder.log_version, 1, {}, "abc")
        assert (before, registry.get_sample_value("grpo_weight_sync_total", labels)) == (1, 2)


def test_a_sync_that_fails_beside_the_steps_is_counted(tmp_path):
    """What fails otherwise in a lane, as an engine that is lost, is no failed sync."""
    with make_recorder(tmp_path, rollout={"max_staleness": 1}, metrics={"port": 0}) as recorder:
        for what, error in (("receive", WeightSyncError), ("switch", WeightSyncError), ("switch", EngineLost)):
            with pytest.raises(error), recorder.lane("rollout", what, 1):
                raise error("gone wrong")
        registry = recorder._prometheus.registry
        labels = {"run": "fake", "result": "error"}
        assert registry.get_sample_value("grpo_weight_sync_total", labels) == 2


def test_a_late_commit_keeps_nothing_of_the_steps_after_it(tmp_path):
    """Versions that were verified late belong to it all the same, and a recovery after it outlives going back once."""
    with make_recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            log_step(recorder, step)
            if step == 2:
                recorder.recovered("rollout", ClusterError("early"), 1.0)
        recorder.log_version(2, {}, "two")
        recorder.recovered("rollout", ClusterError("late"), 1.0)
        recorder.log_version(3, {}, "three")
        attachments = recorder.attachments(2)
        kept = [json.loads(line) for line in attachments["metrics.jsonl"].splitlines()]
        assert [(row["event"], row["step"]) for row in kept] == [
            ("start", 0),
            ("step", 1),
            ("step", 2),
            ("recovery", 2),
            ("weight_sync", 2),
        ]
        recorder.rewind(2, attachments)
        assert events_of(tmp_path)[-2:] == [("weight_sync", 2), ("recovery", 3)]
        assert [row["cause"] for row in rows_of(tmp_path) if row["event"] == "recovery"] == ["early", "late"]


def test_rows_of_many_threads_are_whole_and_none_is_lost_or_doubled_by_going_back(tmp_path):
    """Each thread writes rows of its own while the main one commits and goes back."""
    count = 60
    with make_recorder(tmp_path, metrics={"port": 0}) as recorder:
        log_step(recorder, 1)
        start = threading.Barrier(4)

        def replacing(role):
            start.wait(30)
            for number in range(count):
                recorder.recovered(role, ClusterError(f"{number}"), 0.0)
                recorder.workers(role, number, number)
                with recorder.lane(role, "sample", number):
                    recorder.alive()

        def syncing():
            start.wait(30)
            for _ in range(count):
                recorder.log_version(1, {"sync/bytes": 1.0}, "digest")

        threads = [threading.Thread(target=replacing, args=(role,)) for role in ("rollout", "trainer")]
        threads.append(threading.Thread(target=syncing))
        for thread in threads:
            thread.start()
        start.wait(30)
        while any(thread.is_alive() for thread in threads):
            recorder.rewind(1, recorder.attachments())
        for thread in threads:
            thread.join(30)
        registry = recorder._prometheus.registry
        assert registry.get_sample_value("grpo_weight_sync_bytes_total", {"run": "fake"}) == count
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    for role in ("rollout", "trainer"):
        causes = [row["cause"] for row in rows if row["event"] == "recovery" and row["role"] == role]
        assert causes == [str(number) for number in range(count)]
