"""All runs of a sweep, some at a time, each in a supervising process of its own."""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.chaos.judge import Reference, Verdict, judge, reference
from tests.chaos.plan import HARD, Scenario
from tests.chaos.supervisor import run, stand_alone

COMMAND = (sys.executable, "-m", "tests.chaos.driver", "tests/chaos/run.yaml")
SPARE_STARTS = 2


def disturb(scenarios: Sequence[Scenario], out: Path, side_by_side: int) -> list[Verdict]:
    """Runs each scenario and, first, the undisturbed run of each seed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(side_by_side, mp_context=context, initializer=stand_alone) as pool:
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
