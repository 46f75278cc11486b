"""Processes that are frozen (SIGSTOP), not killed: who notices, how soon, and what a frozen controller may do later."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.chaos.judge import Reference, Verdict, judge
from tests.chaos.plan import Kill, Scenario
from tests.chaos.runs import SPARE_STARTS, exact
from tests.chaos.supervisor import GONE_SECONDS, ROOT, Seen, Start, fresh, gone_within, look_back, run

NOTICED_SECONDS = 15.0
STACKED = ("rollout_actor", "engine_core", "trainer_rank")
FREEZES = (
    Scenario(
        "frozen-actors",
        0,
        (
            Kill("generate.dispatched", 1, "engine_core", action="stop"),
            Kill("generate.dispatched", 5, "rollout_actor", action="stop"),
            Kill("train.forward", 9, "trainer_rank", 1, action="stop"),
            Kill("sync.tensor", 10, "rollout_actor", action="stop"),
            Kill("sync.tensor", 12, "engine_core", action="stop"),
            Kill("sync.dispatched", 16, "trainer_rank", 1, action="stop"),
            Kill("reward.began", 14, "reward_worker", action="stop"),
            Kill("save.files", 18, "trainer_rank", action="stop"),
        ),
        ("rollout.engines=1", "reward_code.seconds=2"),
    ),
    Scenario("frozen-head-1", 0, (Kill("generate.dispatched", 1, "gcs", action="stop"),)),
    Scenario("frozen-head-2", 0, (Kill("save.written", 3, "gcs", action="stop"),), ("deadlines.health=2",)),
)
ZOMBIES = ("save.written@6", "save.manifest@9", "rollout.ended@11", "save.renamed@15")
"""Where starts of one run are frozen, each after the one before; then the run ends, and then they wake up."""


def frozen(scenario: Scenario, command: Sequence[str], out: Path, wanted: Reference) -> Verdict:
    """The run goes on by itself; each freeze is noticed within NOTICED_SECONDS, with the stacks of what was stuck."""
    seen = run(scenario, out, command, starts=len(scenario.kills) + SPARE_STARTS)
    verdict = judge(seen, wanted, exact(command))
    problems = [
        f"{hit.kill.spec} was noticed after {hit.noticed} s"
        for hit in verdict.hits
        if hit.noticed is None or hit.noticed > NOTICED_SECONDS
    ]
    stacks = [file for file in (seen.run_dir / "stacks").glob("*.txt") if file.stat().st_size]
    if len(stacks) < sum(kill.role in STACKED for kill in scenario.kills):
        problems.append(f"stacks of stuck processes: only {[file.name for file in stacks]}")
    codes = [start.code for start in seen.starts]
    expected = [10] * sum(kill.role == "gcs" for kill in scenario.kills) + [0]
    if codes != expected:
        problems.append(f"exit codes {codes} instead of {expected}")
    return Verdict(verdict.run, verdict.hits, (*verdict.problems, *problems), verdict.starts)


def zombies(command: Sequence[str], out: Path, wanted: Reference) -> Verdict:
    """A frozen controller loses its run to the next start, after lease_seconds, and is refused when it wakes up."""
    seen = Seen(Scenario("zombies", 0), out / "zombies" / "run")
    with fresh(seen, out) as (environment, faults):
        sleeping = []
        for place in ZOMBIES:
            environment["GRPO_FAULTS"] = f"{place}:stop"
            sleeping.append(begin(seen, command, environment, faults, f"{place}:stop"))
        environment["GRPO_FAULTS"] = ""
        last = begin(seen, command, environment, faults, "")
        end(seen, *last)
        for process, began in sleeping:
            process.send_signal(signal.SIGCONT)
            end(seen, process, began)
    look_back(seen, faults)
    codes = [start.code for start in seen.starts]
    verdict = judge(Seen(seen.scenario, seen.run_dir, [seen.starts[0]], shm=seen.shm), wanted, exact(command))
    problems = [] if codes == [0] + [13] * len(ZOMBIES) else [f"exit codes {codes}: 0, then 13 of each zombie"]
    problems += [f"left {', '.join(seen.starts[-1].left)}"] if seen.starts[-1].left else []
    said = (faults.parent / "stderr.txt").read_text(encoding="utf-8")
    problems += [f"stderr: {said[-2000:]}"] if problems else []
    return Verdict("zombies", (), (*verdict.problems, *problems), tuple(seen.starts))


def begin(
    seen: Seen,
    command: Sequence[str],
    environment: dict[str, str],
    faults: Path,
    spec: str,
    seconds: float = 300,
) -> tuple[subprocess.Popen[bytes], float]:
    """Starts a driver; returns once it is frozen, or at once without a spec."""
    began = time.time()
    with open(faults.parent / "stderr.txt", "a", encoding="utf-8") as errors:
        driver = subprocess.Popen(
            [*command, f"run.dir={seen.run_dir}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    while spec and driver.poll() is None and time.time() - began < seconds:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED:
                break
        time.sleep(0.05)
    return driver, began


def end(seen: Seen, driver: subprocess.Popen[bytes], began: float, seconds: float = 300) -> None:
    """Waits for a driver. Others may be frozen still: only after the last nothing may be left."""
    try:
        code: int | None = driver.wait(seconds)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        code = None
    last = len(seen.starts) == len(ZOMBIES)
    left = tuple(process.name() for process in gone_within(GONE_SECONDS)) if last else ()
    seen.starts.append(Start(began, time.time(), code, left))
