"""Recorders of fake runs, step by step, and what they wrote."""

import json

from grpo.errors import ClusterError
from grpo.observe.recorder import RunRecorder
from tests.runs import make_config, make_group, make_stats, quiet_progress


def make_recorder(run_dir, **sections):
    config = make_config(**sections)
    return RunRecorder(config, run_dir, quiet_progress(config), ["grpo", "train", "a b.yaml"])


def log_step(recorder, step, stats=None, rewards_G=(1.0, 0.0)):
    with recorder.step(step), recorder.phase("rollout"):
        pass
        recorder.log_step(step, [make_group(rewards_G, step)], stats or make_stats(step))


def rows_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


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
