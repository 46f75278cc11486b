"""All runs of a sweep, some at a time, each in a supervising process of its own."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tests.chaos.judge import Reference, Verdict, judge, reference
from tests.chaos.plan import HARD, Scenario
from tests.chaos.slow import slept
from tests.chaos.supervisor import run, stand_alone

SMALL = (sys.executable, "-m", "tests.chaos.driver", "tests/chaos/run.yaml")
REAL = (sys.executable, "-m", "grpo", "train", "tests/chaos/real.yaml")
MODES: dict[str, tuple[str, ...]] = {
    "sync": (),
    "between": ("rollout.max_staleness=2",),
    "flight": ("rollout.max_staleness=2", "rollout.update=in_flight"),
    "turns": ("cluster.colocate=true",),
    "refill": ("rollout.max_staleness=1", "rollout.refill=true"),
}
"""Overrides of a run, by how it samples ahead."""
SPARE_STARTS = 2
Job = tuple[int, Callable[[Path, Reference], Verdict]]
"""The seed of a run, and what runs it and judges it by the undisturbed run of this seed."""


def perform(jobs: Sequence[Job], out: Path, command: Sequence[str], side_by_side: int) -> list[Verdict]:
    """Runs each job and, first, the undisturbed run of each seed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(side_by_side, mp_context=context, initializer=stand_alone) as pool:
        alone = {seed: pool.submit(undisturbed, seed, out, command) for seed in {seed for seed, _ in jobs}}
        wanted = {seed: future.result() for seed, future in alone.items()}
        futures = [pool.submit(job, out, wanted[seed]) for seed, job in jobs]
        verdicts = []
        for future in as_completed(futures):
            verdicts.append(future.result())
            tell(verdicts, len(futures))
    return sorted(verdicts, key=lambda verdict: verdict.run)


def tell(verdicts: Sequence[Verdict], of: int) -> None:
    last = verdicts[-1]
    seconds = last.starts[-1].ended - last.starts[0].began
    print(f"{len(verdicts)}/{of} {last.run}: {len(last.hits)} hits, {len(last.starts)} starts, {seconds:.0f} s")
    print("".join(f"  {problem}\n" for problem in last.problems), end="", flush=True)


def undisturbed(seed: int, out: Path, command: Sequence[str]) -> Reference:
    seen = run(Scenario(f"undisturbed-seed{seed}", seed), out, command, starts=1 + SPARE_STARTS)
    if not seen.finished:
        raise SystemExit(f"the undisturbed run failed, exit code {seen.starts[-1].code}: {seen.errors}")
    return reference(seen.run_dir)


def disturbed(scenario: Scenario, command: Sequence[str], out: Path, wanted: Reference) -> Verdict:
    hard = sum(kill.role in HARD for kill in scenario.kills)
    seen = run(scenario, out, command, starts=1 + hard + SPARE_STARTS)
    return judge(seen, wanted, exact(command))


def slow(scenario: Scenario, command: Sequence[str], out: Path, wanted: Reference) -> Verdict:
    """Calls take a random time longer: nothing else is another. One start is enough."""
    seen = run(scenario, out, command, starts=1)
    verdict, seconds = judge(seen, wanted, exact(command)), slept(out / scenario.name / "faults")
    return replace(verdict, slept=seconds, problems=verdict.problems + (() if seconds else ("nothing was slowed",)))


def exact(command: Sequence[str]) -> bool:
    """Whether two runs of it are equal bit for bit."""
    return "rollout.update=in_flight" not in command
