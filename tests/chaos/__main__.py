"""The sweep of kills: `python -m tests.chaos`, or `make chaos`. Exit code 1 if a promise is not kept."""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.chaos.judge import Reference, Verdict, judge, reference
from tests.chaos.plan import HARD, PHASES, ROLES, Scenario, quick, sweep
from tests.chaos.report import missed_targets, show
from tests.chaos.supervisor import ROOT, adopt_orphans, run

COMMAND = (sys.executable, "-m", "tests.chaos.driver", "tests/chaos/run.yaml")
SPARE_STARTS = 2


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


def disturb(scenarios: Sequence[Scenario], out: Path, side_by_side: int) -> list[Verdict]:
    """Runs each scenario and, first, the undisturbed run of each seed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(side_by_side, mp_context=context, initializer=adopt_orphans) as pool:
        alone = {seed: pool.submit(undisturbed, seed, out) for seed in {scenario.seed for scenario in scenarios}}
        wanted = {seed: future.result() for seed, future in alone.items()}
        futures = [pool.submit(disturbed, scenario, out, wanted[scenario.seed]) for scenario in scenarios]
        verdicts = []
        for future in as_completed(futures):
            verdict = future.result()
            verdicts.append(verdict)
            seconds = verdict.starts[-1].ended - verdict.starts[0].began
            print(
                f"{len(verdicts)}/{len(futures)} {verdict.run}: {len(verdict.hits)} kills, {seconds:.0f} s", flush=True
            )
            print("".join(f"  {problem}\n" for problem in verdict.problems), end="", flush=True)
    return sorted(verdicts, key=lambda verdict: verdict.run)


def undisturbed(seed: int, out: Path) -> Reference:
    seen = run(Scenario(f"undisturbed-seed{seed}", seed), out, COMMAND, starts=1)
    if not seen.finished:
        raise SystemExit(f"the undisturbed run failed, exit code {seen.starts[-1].code}: {seen.errors}")
    return reference(seen.run_dir)


def disturbed(scenario: Scenario, out: Path, wanted: Reference) -> Verdict:
    hard = sum(kill.role in HARD for kill in scenario.kills)
    return judge(run(scenario, out, COMMAND, starts=1 + hard + SPARE_STARTS), wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
