"""From findings to lines and exit codes."""

import pytest

from grpo.errors import ClusterError, ConfigError
from grpo.plan.preflight.verdict import Check, Problem, conclude, judge, lines


def test_findings_become_one_line_the_worst_first() -> None:
    problems = [Problem("warning", "a", "slow"), *(Problem("failed", f"n{i}", "small") for i in range(5))]
    check = judge("memory", problems, "fine", "raise it")
    assert check == Check("memory", "failed", "n0, n1, n2 and 2 more: small; a: slow. raise it")
    assert judge("memory", [], "fine", "raise it") == Check("memory", "ok", "fine")
    told = lines([check, Check("x", "ok", "\x1b[1m")])
    assert told == [f"failed   memory  {check.text}", "ok       x       \\x1b[1m"]


def test_what_may_come_by_itself_has_another_exit_code() -> None:
    conclude([Check("a", "ok", ""), Check("b", "warning", "")])
    with pytest.raises(ClusterError, match="not there yet: b"):
        conclude([Check("a", "ok", ""), Check("b", "missing", "")])
    with pytest.raises(ConfigError, match="2 of 2 checks failed: a, b"):
        conclude([Check("a", "failed", ""), Check("b", "missing", "")])
