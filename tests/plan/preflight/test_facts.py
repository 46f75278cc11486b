"""What a node tells of itself."""

from pathlib import Path

import pytest

from grpo.plan.memory import GIB
from grpo.run.memory import memory_limit


@pytest.mark.parametrize(("text", "limit"), [("max", 2**62), ("1073741824", GIB), ("9223372036854771712", 2**62)])
def test_the_limit_of_the_container_is_read(tmp_path: Path, text: str, limit: int) -> None:
    (tmp_path / "memory.max").write_text(text + "\n")
    found = memory_limit([str(tmp_path / "memory.max"), str(tmp_path / "none")])
    assert found == limit if limit == GIB else GIB < found < limit
