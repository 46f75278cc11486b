"""What a check ends with, and how the findings of many nodes become one line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo.config.text import clean
from grpo.errors import ClusterError, ConfigError

Status = Literal["ok", "warning", "missing", "failed"]
RANKS: tuple[Status, ...] = ("ok", "warning", "missing", "failed")
"""missing: failed, but it may come by itself."""
SHOWN_NODES, SHOWN_PROBLEMS = 3, 3


@dataclass(frozen=True)
class Check:
    """`text`: what was found and, unless all is well, the way out; one line."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True)
class Problem:
    """What is wrong on a node; `node` is "" where it is no node's fault."""

    status: Status
    node: str
    text: str


def judge(name: str, problems: Iterable[Problem], well: str, way_out: str = "") -> Check:
    """One check of many findings, the worst first; equal ones of several nodes are told once."""
    told: dict[tuple[Status, str], list[str]] = {}
    for problem in problems:
        told.setdefault((problem.status, problem.text), []).append(problem.node)
    if not told:
        return Check(name, "ok", well)
    worst = sorted(told, key=lambda key: -RANKS.index(key[0]))
    parts = [with_nodes(told[key], key[1]) for key in worst[:SHOWN_PROBLEMS]]
    more = [f"{len(worst) - SHOWN_PROBLEMS} more"] if len(worst) > SHOWN_PROBLEMS else []
    return Check(name, worst[0][0], ". ".join(["; ".join(parts + more), *filter(None, [way_out])]))


def lines(checks: Sequence[Check]) -> list[str]:
    """One for each check; nothing in them steers a terminal."""
    width = max(len(check.name) for check in checks)
    return [f"{check.status:<7}  {check.name:<{width}}  {clean(check.text)}" for check in checks]


def conclude(checks: Sequence[Check]) -> None:
    """Raises ConfigError if a check failed for good, ClusterError if what is missing may come by itself."""
    failed = [check.name for check in checks if check.status == "failed"]
    missing = [check.name for check in checks if check.status == "missing"]
    if failed:
        names = ", ".join([*failed, *missing])
        raise ConfigError(f"preflight: {len(failed + missing)} of {len(checks)} checks failed: {names}")
    if missing:
        raise ClusterError(f"preflight: not there yet: {', '.join(missing)}; start again once it is")


def with_nodes(nodes: Sequence[str], text: str) -> str:
    """ "a, b and 3 more: text", or the text alone where no node has a name."""
    named = list(filter(None, nodes))
    more = f" and {len(named) - SHOWN_NODES} more" if len(named) > SHOWN_NODES else ""
    return f"{', '.join(named[:SHOWN_NODES])}{more}: {text}" if named else text
