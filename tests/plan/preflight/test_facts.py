"""What a node tells of itself."""

import os
from pathlib import Path

import pytest

from grpo.plan.memory import GIB
from grpo.plan.preflight.facts import gpu_memory
from grpo.run.memory import memory_limit


@pytest.mark.parametrize(("text", "limit"), [("max", 2**62), ("1073741824", GIB), ("9223372036854771712", 2**62)])
def test_the_limit_of_the_container_is_read(tmp_path: Path, text: str, limit: int) -> None:
    (tmp_path / "memory.max").write_text(text + "\n")
    found = memory_limit([str(tmp_path / "memory.max"), str(tmp_path / "none")])
    assert found == limit if limit == GIB else GIB < found < limit


SMI = "0, GPU-aa11, 1000\n1, GPU-ab22, 2000\n2, GPU-cc33, [N/A]\n3, GPU-dd44, 4000\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [1000, 2000, 4000]),
        ("", []),
        ("1", [2000]),
        ("3,0", [4000, 1000]),
        ("0, 1", [1000, 2000]),
        ("GPU-dd", [4000]),
        ("GPU-a", []),
        ("0,9,1", [1000]),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_gpus_are_those_that_cuda_visible_devices_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[int]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{SMI}'")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_memory(visible) == tuple(size << 20 for size in expected)
