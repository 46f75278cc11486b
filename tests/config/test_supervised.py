"""The configuration of a warm-up: a whole one, of a run of its own."""

import pytest
from pydantic import ValidationError

from grpo.config import Config
from grpo.config.diff import check_config_diff
from grpo.config.supervised import supervised, with_steps
from grpo.errors import ConfigError


def configure(**sections: object) -> Config:
    return Config.model_validate({"model": {"path": "models/tiny"}} | sections)


def test_it_is_a_whole_configuration_in_folders_of_its_own() -> None:
    sft = {"learning_rate": 3e-5, "schedule": "cosine", "rows_per_step": 7, "eval_every": 5, "warmup_ratio": 0.1}
    config = configure(
        run={"name": "a" * 47, "dir": "runs/x/"},
        checkpoint={"dir": "s3://bucket/x", "every": 3},
        sync={"every": 3},
        train={"minibatches": 4, "epochs": 2, "zero_stage": 2, "warmup_steps": 50},
        rollout={"max_tokens": 99, "temperature": 0.7},
        sft=sft,
    )
    made = with_steps(supervised(config), rows=100)
    assert Config.model_validate(made.model_dump(mode="json")) == made
    assert (made.run.dir, made.checkpoint.dir) == ("runs/x/sft", "s3://bucket/x/sft")
    assert (made.run.name, len(made.run.name)) == ("a" * 43 + "-sft", 47)
    assert (made.run.steps, made.train.warmup_steps) == (15, 2)
    assert (made.train.learning_rate, made.train.schedule, made.train.zero_stage) == (3e-5, "cosine", 2)
    assert (made.train.minibatches, made.train.epochs, made.rollout.prompts_per_step) == (1, 1, 7)
    assert (made.rollout.temperature, made.rollout.max_tokens, made.eval.every) == (1.0, 99, 5)


@pytest.mark.parametrize(
    ("sft", "rows", "steps"),
    [
        ({"epochs": 1, "rows_per_step": 32}, 64, 2),
        ({"epochs": 1, "rows_per_step": 32}, 65, 3),
        ({"epochs": 0.1, "rows_per_step": 3}, 30, 1),
        ({"epochs": 1e-9}, 10, 1),
        ({"epochs": 3, "rows_per_step": 10}, 10, 3),
        ({"epochs": 3, "steps": 2}, 10_000, 2),
    ],
)
def test_how_many_steps_it_makes(sft: dict[str, object], rows: int, steps: int) -> None:
    assert with_steps(supervised(configure(sft=sft)), rows).run.steps == steps


def test_a_warm_up_goes_on_with_its_own_knobs_and_a_run_does_not_look_at_them() -> None:
    before, after = configure(sft={"learning_rate": 1e-5}), configure(sft={"learning_rate": 2e-5})
    check_config_diff(before.model_dump(mode="json"), after)
    with pytest.raises(ConfigError, match="train.learning_rate"):
        check_config_diff(supervised(before).model_dump(mode="json"), supervised(after))


@pytest.mark.parametrize(
    "sft", [{"epochs": 0}, {"warmup_ratio": 1.5}, {"format": "latex"}, {"rows_per_step": 0}, {"learning_rate": 0}]
)
def test_bad_values_are_refused(sft: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        configure(sft=sft)


@pytest.mark.parametrize("sections", [{"sft": {"rows_per_step": 1}, "train": {"ranks": 2}}, {"train": {"ranks": 64}}])
def test_each_rank_of_a_warm_up_needs_a_row_but_not_of_a_run_without_one(sections: dict[str, object]) -> None:
    config = configure(**sections)
    with pytest.raises(ConfigError, match="each rank needs a row of each step: sft.rows_per_step .* raise"):
        supervised(config)
