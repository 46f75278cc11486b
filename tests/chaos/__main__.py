"""The sweep of kills: `python -m tests.chaos`, or `make chaos`. Exit code 1 if a promise is not kept."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.plan import PHASES, ROLES, quick, sweep
from tests.chaos.report import missed_targets, show
from tests.chaos.runs import disturb
from tests.chaos.supervisor import ROOT


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="how often each role is killed at each point")
    parser.add_argument("--roles", type=names(ROLES), default=ROLES, help=f"some of {','.join(ROLES)}")
    parser.add_argument(
        "--phases", type=names(tuple(PHASES)), default=tuple(PHASES), help=f"some of {','.join(PHASES)}"
    )
    parser.add_argument("--quick", action="store_true", help="a few kills of every role")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "chaos", help="where runs and figures go")
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    chosen = parser.parse_args(arguments)
    scenarios = quick() if chosen.quick else sweep(chosen.roles, chosen.phases, chosen.seeds)
    began = time.monotonic()
    verdicts = disturb(scenarios, chosen.out, chosen.side_by_side)
    title = f"{sum(len(verdict.hits) for verdict in verdicts)} kills in {time.monotonic() - began:.0f} s"
    by = [("role", lambda hit: hit.kill.role), ("phase", lambda hit: hit.kill.phase)]
    show(title, verdicts, by, chosen.out / "kills.json")
    missed = missed_targets(verdicts)
    print("\n".join(f"MISSED {line}" for line in missed) or "all targets are met")
    return 1 if missed else 0


def names(allowed: Sequence[str]):
    """Parses a list of names."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := set(found) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be of {', '.join(allowed)}")
        return found

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
