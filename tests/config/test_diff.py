import json

import pytest

from grpo.config import Config
from grpo.config.diff import FREE, FREE_SECTIONS, check_config_diff, flatten
from grpo.errors import ConfigError
from tests.config.test_schema import leaves


def make(**sections) -> Config:
    return Config.model_validate({"model": {"path": "/model"}} | sections)


def saved(config: Config) -> dict:
    """As a checkpoint holds it."""
    return json.loads(json.dumps(config.model_dump(mode="json")))


OLD = saved(make(train={"betas": [0.9, 0.99]}, rewards=[{"function": "boxed", "weight": 2}]))
SAME = {"train": {"betas": [0.9, 0.99]}, "rewards": [{"function": "boxed", "weight": 2}]}


def test_flatten():
    assert flatten({"run": {"steps": 3, "deep": {"a": None}}, "x": [1]}) == {
        "run.steps": 3,
        "run.deep": {"a": None},
        "x": [1],
    }


def test_the_same_configuration():
    check_config_diff(OLD, make(**SAME))


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"dir": "elsewhere", "resume": "never", "lease_seconds": 1, "grace_seconds": 5, "max_recoveries": 0}},
        {"metrics": {"port": 0}},
        {"deadlines": {"train": 5}},
        {"cluster": {"address": "auto"}},
        {"checkpoint": {"every": 1, "keep": 7, "dir": "s3://bucket/x"}},
        {"reward_code": {"workers": 9}},
    ],
)
def test_how_and_where_it_runs_does_not_count(change):
    check_config_diff(OLD, make(**SAME | change))


def test_every_difference_is_listed():
    new = make(run={"steps": 7}, train={"betas": [0.9, 0.95], "learning_rate": 0.5}, data={"source": "other.jsonl"})
    with pytest.raises(ConfigError) as caught:
        check_config_diff(OLD, new)
    assert str(caught.value).splitlines() == [
        "a run is resumed with the configuration that it was begun with, but these keys differ:",
        "  run.steps: 100 -> 7",
        '  data.source: "openai/gsm8k" -> "other.jsonl"',
        '  rewards: [{"function": "boxed", "weight": 2.0}] -> [{"function": "gsm8k", "weight": 1.0}]',
        "  train.learning_rate: 1e-06 -> 0.5",
        "  train.betas: [0.9, 0.99] -> [0.9, 0.95]",
        "set them back, allow them with 'run.allow_drift=[run.steps, data.source, rewards, train.learning_rate, "
        "train.betas]', or choose another run.dir",
    ]


def test_keys_are_allowed_one_by_one():
    changed = {"data": {"source": "other.jsonl"}, "train": {**SAME["train"], "learning_rate": 0.5}}
    allowed = ["train.learning_rate", "data.source"]
    check_config_diff(OLD, make(**SAME | changed, run={"allow_drift": allowed}))
    with pytest.raises(ConfigError, match=r"allow_drift=\[data.source\]"):
        check_config_diff(OLD, make(**SAME | changed, run={"allow_drift": allowed[:1]}))


@pytest.mark.parametrize("name", ["train", "learning_rate", "train.lr", "TRAIN.LEARNING_RATE"])
def test_an_allowed_key_that_is_none(name):
    with pytest.raises(ConfigError, match="run.allow_drift.*is none"):
        check_config_diff(OLD, make(**SAME, run={"allow_drift": [name]}))


def test_a_key_that_is_new_had_its_default():
    old = saved(make(**SAME))
    del old["train"]["learning_rate"], old["reward_code"]
    check_config_diff(old, make(**SAME))
    with pytest.raises(ConfigError, match="train.learning_rate: 1e-06 -> 0.5"):
        check_config_diff(old, make(**SAME | {"train": {**SAME["train"], "learning_rate": 0.5}}))


@pytest.mark.parametrize(("before", "differs"), [(8192, False), (4096, True)])
def test_the_number_of_tokens_that_was_the_default_is_auto_now(before, differs):
    """A run that was begun with it keeps it (`tokens_before`)."""
    old = saved(make(**SAME))
    old["train"]["tokens_per_micro_batch"] = before
    if not differs:
        check_config_diff(old, make(**SAME))
        return
    with pytest.raises(ConfigError, match='train.tokens_per_micro_batch: 4096 -> "auto"'):
        check_config_diff(old, make(**SAME))


def test_auto_is_no_number_where_a_gpu_has_decided():
    with pytest.raises(ConfigError, match='train.tokens_per_micro_batch: "auto" -> 8192'):
        check_config_diff(OLD, make(**SAME | {"train": {**SAME["train"], "tokens_per_micro_batch": 8192}}))


def test_a_key_that_is_gone_counts_until_it_is_allowed():
    old = saved(make(**SAME))
    old["train"]["momentum"] = 0.5
    with pytest.raises(ConfigError, match="train.momentum: 0.5 -> no such key"):
        check_config_diff(old, make(**SAME))
    check_config_diff(old, make(**SAME, run={"allow_drift": ["train.momentum"]}))


def test_another_number_of_engines_is_no_other_run():
    for engines in (3, {"min": 1, "max": 4}):
        check_config_diff(
            saved(make(**SAME)), make(**SAME | {"rollout": {**SAME.get("rollout", {}), "engines": engines}})
        )


def test_every_free_key_is_a_key():
    keys = set(leaves(Config))
    assert keys | {key.rpartition(".")[0] for key in keys} >= FREE
    assert {key.partition(".")[0] for key in keys} >= FREE_SECTIONS


def test_a_curriculum_is_one_key_and_may_change_if_it_is_named():
    old = make().model_dump(mode="json")
    assert old["data"].pop("curriculum") is None  # as in a checkpoint of a program that knew none
    check_config_diff(old, make())
    with pytest.raises(ConfigError, match=r"data\.curriculum"):
        check_config_diff(old, make(data={"curriculum": {}}))
    named = {"run": {"allow_drift": ["data.curriculum"]}}
    check_config_diff(old, make(data={"curriculum": {}}, **named))
    on = make(data={"curriculum": {}}).model_dump(mode="json")
    check_config_diff(on, make(data={"curriculum": {"easy_threshold": 1}}))
    check_config_diff(on, make(**named))
    with pytest.raises(ConfigError, match=r"data\.curriculum"):
        check_config_diff(on, make(data={"curriculum": {"window": 2}}))
