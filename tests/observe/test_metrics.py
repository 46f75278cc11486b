import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.evaluation import score_evaluation
from grpo.observe.metrics import CATALOGUE, lookup, summarize
from tests.runs import make_group, make_stats


def test_names_are_unique_prefixed_and_typed_by_their_suffix():
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert re.fullmatch(r"grpo_[a-z][a-z_]*[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name


def test_no_key_belongs_to_two_metrics():
    keys = [key for metric in CATALOGUE for key in metric.keys]
    assert len(set(keys)) == len(keys)
    assert all(lookup(key)[0] is metric for metric in CATALOGUE for key in metric.keys)


@pytest.mark.parametrize(
    ("key", "name", "label"),
    [
        ("train/loss", "grpo_loss", ""),
        ("train/clip_high", "grpo_clip_ratio", "high"),
        ("train/seconds_forward", "grpo_train_part_seconds", "forward"),
        ("eval/pass@4", "grpo_eval_score", "pass@4"),
        ("eval/maj@16", "grpo_eval_score", "maj@16"),
        ("phase/weight_sync", "grpo_phase_duration_seconds", "weight_sync"),
        ("sync/bytes", "grpo_weight_sync_bytes_total", ""),
    ],
)
def test_lookup(key, name, label):
    metric, found = lookup(key)
    assert (metric.name, found) == (name, label)


@pytest.mark.parametrize("key", ["train/los", "phase/dinner", "eval/pass", "loss", "train/losses"])
def test_an_unknown_key_is_our_mistake(key):
    with pytest.raises(AssertionError, match="no metric"):
        lookup(key)


def test_the_keys_of_the_evaluation_and_the_trainer_are_known():
    scores = score_evaluation([make_group([1.0, 0.0, 0.0, 1.0])])
    assert {"eval/accuracy", "eval/pass@4", "eval/maj@4"} <= set(scores)
    for key in scores | make_stats(1):
        lookup(key)


def test_summarize():
    groups = [make_group([1.0, 0.0], step=5, truncated=1), make_group([1.0, 1.0], step=3, row=1)]
    assert summarize(groups, step=5) == {
        "reward/mean": 0.75,
        "reward/std": pytest.approx(math.sqrt(3) / 4),
        "reward/zero_variance": 0.5,
        "completion/tokens": 10.5,
        "completion/truncated": 0.25,
        "completion/overlong_penalty": 0.0,
        "rollout/prompt_tokens": 10.0,
        "rollout/completion_tokens": 42.0,
        "rollout/staleness": 1.0,  # two samples of version 4, as fresh as can be, two of version 2
        "rollout/staleness_max": 2.0,
    }


def test_the_lag_of_a_sample_is_that_of_its_oldest_token():
    mixed = make_group([1.0, 0.0], step=5)
    spans = replace(mixed.samples[0], versions=((0, 2), (4, 3), (9, 4)))
    stats = summarize([replace(mixed, samples=(spans, mixed.samples[1]))], step=5)
    assert (stats["rollout/staleness"], stats["rollout/staleness_max"]) == (1.0, 2.0)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=8), min_size=1, max_size=8))
def test_summarize_is_within_its_bounds(rewards_PG):
    stats = summarize([make_group(rewards_G) for rewards_G in rewards_PG], step=1)
    flat = [reward for rewards_G in rewards_PG for reward in rewards_G]
    assert min(flat) <= stats["reward/mean"] <= max(flat)
    assert 0 <= stats["reward/std"] <= (max(flat) - min(flat)) / 2 + 1e-12
    same = sum(max(rewards_G) == min(rewards_G) for rewards_G in rewards_PG)
    assert stats["reward/zero_variance"] == pytest.approx(same / len(rewards_PG))
    assert stats["rollout/staleness"] == 0.0
