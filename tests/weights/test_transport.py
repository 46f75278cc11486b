"""Which way a transfer's url names."""

from typing import Any

import pytest

from grpo.errors import WeightSyncError
from grpo.weights.transport import TRANSPORTS, make_transport
from tests.runs import make_config


def test_the_scheme_of_the_url_chooses_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setitem(TRANSPORTS, "pigeon", lambda *args: asked.append(args))  # type: ignore[arg-type,return-value]
    config = make_config()
    make_transport(config, "cpu", "pigeon://roof:3", rank=1, world_size=4, secret="s")
    assert asked == [(config, "cpu", "roof:3", 1, 4, "s")]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="^weights travel by nccl, gloo, ipc, but the trainer offers owl://here"):
        make_transport(make_config(), "cpu", "owl://here", rank=0, world_size=2, secret="s")
