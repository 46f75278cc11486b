"""The sweep of kills: `python -m tests.chaos`, or `make chaos`. Exit code 1 if a promise is not kept.

Small actors stand in for vLLM and DeepSpeed, so that some hundred kills take minutes; --real kills the real ones.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.chaos.freeze import FREEZES, frozen, zombies
from tests.chaos.plan import PHASES, ROLES, quick, real, slowed, sweep
from tests.chaos.report import missed_targets, show
from tests.chaos.runs import MODES, REAL, SMALL, Job, disturbed, perform, slow
from tests.chaos.supervisor import ROOT

SLOWED = 6
"""Runs of the sweep that are slowed at random."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="how often each role is killed at each point")
    parser.add_argument("--roles", type=names(ROLES), default=ROLES, help=f"some of {','.join(ROLES)}")
    parser.add_argument("--phases", type=names(tuple(PHASES)), default=(*PHASES,), help=f"some of {','.join(PHASES)}")
    parser.add_argument("--quick", action="store_true", help="a few kills of every role, nothing frozen or slowed")
    parser.add_argument("--real", action="store_true", help="24 kills of the real stack")
    parser.add_argument("--mode", choices=MODES, default="sync", help="how sampling and training overlap")
    parser.add_argument("--freeze", action="store_true", help="no kills: only what is frozen")
    parser.add_argument("--slow", action="store_true", help="no kills: only runs whose calls take a random time longer")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "chaos", help="where runs and figures go")
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at a time")
    chosen = parser.parse_args(arguments)
    command = (*(REAL if chosen.real else SMALL), *MODES[chosen.mode])
    began = time.monotonic()
    verdicts = perform(jobs_of(chosen, command), chosen.out.resolve(), command, chosen.side_by_side)
    title = f"{sum(len(verdict.hits) for verdict in verdicts)} hits in {time.monotonic() - began:.0f} s"
    show(title, verdicts, chosen.out / f"{'real' if chosen.real else 'small'}.json")
    missed = missed_targets(verdicts)
    print("\n".join(f"MISSED {line}" for line in missed) or "all targets are met")
    return 1 if missed else 0


def jobs_of(chosen: argparse.Namespace, command: Sequence[str]) -> list[Job]:
    if chosen.real:
        return [(kills.seed, partial(disturbed, kills, command)) for kills in real()]
    only = chosen.freeze or chosen.slow
    kills = quick() if chosen.quick else [] if only else sweep(chosen.roles, chosen.phases, chosen.seeds)
    jobs: list[Job] = [(scenario.seed, partial(disturbed, scenario, command)) for scenario in kills]
    whole = (chosen.roles, chosen.phases) == (ROLES, (*PHASES,))
    if whole and not (chosen.freeze or chosen.quick):
        jobs += [(each.seed, partial(slow, each, command)) for each in slowed(SLOWED)]
    if whole and not (chosen.slow or chosen.quick):
        jobs += [(scenario.seed, partial(frozen, scenario, command)) for scenario in FREEZES]
        jobs.append((0, partial(zombies, command)))
    return jobs


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
