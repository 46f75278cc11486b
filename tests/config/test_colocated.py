"""What engines and ranks in turns ask of other keys."""

from typing import Any

import pytest
from pydantic import ValidationError

from grpo.config import Config

TURNS: dict[str, Any] = {"model": {"path": "models/none"}, "cluster": {"colocate": True}}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rollout": {"engines": 4}, "train": {"ranks": 4}},
        {"rollout": {"engines": 6, "engines_per_gpu": 3}, "train": {"ranks": 2, "zero_stage": 3}},
        {"rollout": {"engines": {"min": 2, "max": 2}}, "train": {"ranks": 2}},
    ],
)
def test_each_rank_has_its_engines(given: dict[str, Any]) -> None:
    assert Config.model_validate(TURNS | given).roles_share_gpus


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollout": {"max_staleness": 1}}, "work one after the other, but rollout.max_staleness is 1; remove it, or"),
        ({"sync": {"every": 2}, "checkpoint": {"every": 2}}, "no weights before the next sync, but sync.every is 2"),
        ({"rollout": {"tensor_parallel": 2}}, "one rank and whole engines, but rollout.tensor_parallel is 2"),
        ({"rollout": {"gpus_per_engine": 0.5}}, "whole GPU in its turn, but rollout.gpus_per_engine is 0.5"),
        ({"train": {"gpus_per_rank": 0.5}}, "whole GPU in its turn, but train.gpus_per_rank is 0.5"),
        ({"rollout": {"engines": 2}}, "but rollout.engines is 2 and train.ranks 1; write rollout.engines: 1"),
        ({"rollout": {"engines": {"min": 1, "max": 2}}}, "is 1 to 2 and train.ranks 1; write rollout.engines: 1"),
        ({"rollout": {"engines_per_gpu": 2}, "train": {"ranks": 3}}, "write rollout.engines: 6"),
    ],
)
def test_other_layouts_are_refused_with_the_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Config.model_validate(TURNS | given)
    assert message in str(refused.value)
