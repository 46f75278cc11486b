"""Where the copy of weights that arrive beside sampling lies."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grpo.config import Config
from grpo.rollout.shadow import Shadow


class Nothing:
    """A transfer that brings no tensor."""

    def receive(self) -> Iterator[Any]:
        return iter(())

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("sharing", "free", "on_device"), [(1, 201, True), (1, 199, False), (3, 399, False), (3, 401, True)]
)
def test_engines_that_share_a_gpu_leave_room_for_the_copies_of_the_others(
    sharing: int, free: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ask before anyone has taken it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1000))
    expected = [("w", (25,), "float32")]
    shadow: Any = Shadow(1, Nothing(), expected, torch.device("cuda"), sharing)  # type: ignore[arg-type]
    assert shadow.on_device == on_device
    shadow._thread.join(10)


@pytest.mark.parametrize(
    ("rollout", "sharing"),
    [
        ({}, 1),
        ({"tensor_parallel": 2}, 1),
        ({"engines": 6, "engines_per_gpu": 3}, 3),
        ({"engines": 6, "gpus_per_engine": 0.33}, 3),
        ({"engines": 2, "gpus_per_engine": 0.12}, 2),
        ({"gpus_per_engine": 0.5}, 1),
    ],
)
def test_how_many_engines_are_on_a_gpu(rollout: dict[str, Any], sharing: int) -> None:
    config = Config.model_validate({"model": {"path": "x"}, "rollout": rollout})
    assert config.rollout.sharing == sharing
