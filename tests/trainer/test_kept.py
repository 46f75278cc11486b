"""The coefficient of KL in a checkpoint's header: written, taken over, and named where it is damaged."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from grpo.algorithm.kl_control import KlController
from grpo.config import Config
from grpo.errors import CheckpointError
from grpo.trainer.kept import Kept
from grpo.trainer.state import HEADER
from grpo.trainer.validation import SkipBudget

CONTROLLED = {"kl": "k1", "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 100}


class Nothing(Kept):
    """A trainer of no parameter: what it keeps are its counters."""

    def __init__(self, **algorithm: Any) -> None:
        self.config = Config.model_validate({"model": {"path": "m"}, "algorithm": algorithm})
        self.rank, self.device, self.token_budget, self.frozen = 0, torch.device("cpu"), 2048, ""
        self.policy: Any = SimpleNamespace(compiled=False)
        self.weights: Any = SimpleNamespace(params={}, param_records=lambda: [], save=lambda *_: None)
        self.engine: Any = SimpleNamespace(shards=None)
        self.drift: Any = SimpleNamespace(kept={}, restore=lambda _: None)
        self.budget, self.control = SkipBudget(3), KlController(self.config.algorithm)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """With a process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    (tmp_path / "state").mkdir()
    yield tmp_path / "state"
    distributed.destroy_process_group()


def test_the_controller_goes_on_from_the_checkpoint(folder: Path) -> None:
    before = Nothing(**CONTROLLED)
    before.control.update(1.0, 50)
    before.budget.in_row = 2
    before.save_state(folder, step=5)
    assert json.loads((folder / HEADER).read_text())["counters"] == {"skipped_in_row": 2, "kl_coef": 0.1 * 1.1}
    after = Nothing(**CONTROLLED)
    assert after.load_state(folder, 5) == ()
    assert (after.control.coef, after.budget.in_row) == (before.control.coef, 2)
    for trainer in (before, after):
        trainer.control.update(0.45, 100)
    assert after.control.coef == before.control.coef == pytest.approx(0.099)


def test_without_a_target_the_coefficient_is_the_configurations(folder: Path) -> None:
    before = Nothing(**CONTROLLED)
    before.control.coef = 0.7
    before.save_state(folder)
    after = Nothing(kl_coef=0.2)
    after.load_state(folder)
    assert after.control.coef == 0.2


def rewrite(folder: Path, counters: object) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | {"counters": counters}))


def test_a_checkpoint_of_before_there_was_a_controller_begins_with_the_configurations(folder: Path) -> None:
    Nothing(**CONTROLLED).save_state(folder)
    rewrite(folder, {"skipped_in_row": 1})
    after = Nothing(**CONTROLLED)
    after.load_state(folder)
    assert (after.control.coef, after.budget.in_row) == (0.1, 1)


@pytest.mark.parametrize(
    "counters",
    [{"kl_coef": "much"}, {"kl_coef": None}, {"kl_coef": float("nan")}, {"kl_coef": float("inf")}, {"kl_coef": -0.1},
     {"skipped_in_row": []}, [1], 5, None],
)  # fmt: skip
def test_counters_that_are_no_numbers_are_damage(folder: Path, counters: object) -> None:
    Nothing(**CONTROLLED).save_state(folder)
    rewrite(folder, counters)
    with pytest.raises(CheckpointError, match=r"trainer.json it does not open .*remove this checkpoint's folder"):
        Nothing(**CONTROLLED).load_state(folder)
