"""kubectl and helm that answer as a test says."""

from pathlib import Path

import pytest

from grpo.kubernetes import logs, stop
from tests.kubernetes.programs import Programs


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    for module in (logs, stop):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    for name in ("PAUSE_SECONDS", "QUIET_SECONDS"):
        monkeypatch.setattr(logs, name, 0.02)
    return Programs(folder, monkeypatch)
