"""Fault points: nothing without GRPO_FAULTS; with it the named thing, once."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.run.faults import POINTS, fault_point, phase_point, publish_pids, struck_name


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPO_FAULTS", raising=False)
    fault_point("no such point", 1)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GRPO_FAULT_DIR", str(tmp_path))
    return tmp_path


def test_a_fault_strikes_in_its_place_and_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("GRPO_FAULTS", "save.begin@3:raise; train.optimizer@4/1:raise")
    fault_point("save.begin", 2)
    fault_point("train.optimizer", 4)  # rank 0
    with pytest.raises(OSError, match="injected"):
        fault_point("save.begin", 3)
    fault_point("save.begin", 3)
    with pytest.raises(OSError, match="injected"):
        fault_point("train.optimizer", 4, rank=1)
    assert {path.name for path in folder.iterdir()} == {
        struck_name("save.begin@3:raise"),
        struck_name("train.optimizer@4/1:raise"),
    }


def test_only_the_edges_of_phases_that_are_points_are_passed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("GRPO_FAULTS", "reward.ended@2:raise")
    phase_point("checkpoint", "began", 2)
    phase_point("reward", "began", 2)
    with pytest.raises(OSError, match="injected"):
        phase_point("reward", "ended", 2)
    assert "checkpoint.began" not in POINTS


def test_another_role_is_hit_by_the_pid_that_it_published(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    victims = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    publish_pids("trainer_rank", [victim.pid for victim in victims])
    assert json.loads((folder / "pids.json").read_text()) == {"trainer_rank": [victim.pid for victim in victims]}
    monkeypatch.setenv("GRPO_FAULTS", "sync.done@1:kill=trainer_rank/1")
    fault_point("sync.done", 1)
    assert victims[1].wait(30) == -signal.SIGKILL
    assert victims[0].poll() is None
    victims[0].kill()
    victims[0].wait()
