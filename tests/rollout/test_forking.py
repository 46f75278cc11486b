"""Work that is done in a fork of a process."""

import os
import time

import pytest

from grpo.rollout import forking
from grpo.rollout.forking import in_a_fork

seen: list[int] = []


def elsewhere() -> int:
    seen.append(1)
    return os.getpid()


def test_the_answer_comes_from_another_process_and_nothing_else_does() -> None:
    pid = in_a_fork(elsewhere, otherwise=lambda work: -1)
    assert pid not in (os.getpid(), -1) and seen == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("fault", [lambda: os._exit(3), lambda: 1 // 0, lambda: time.sleep(60)])
def test_where_the_fork_fails_there_is_another_way(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "SECONDS", 1.0)
    assert in_a_fork(fault, otherwise=lambda work: work is fault) is True  # type: ignore[arg-type, return-value]
