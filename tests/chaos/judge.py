"""What a disturbed run is compared with: the rows, prompts and files of the same run left alone."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from grpo.errors import GrpoError
from grpo.observe.audit import audit
from tests.chaos.plan import HARD, SOFT, Kill
from tests.chaos.supervisor import Seen, Start

CLOCKS = ("time", "phase/*", "step/seconds", "step/tokens_per_second", "train/seconds_*")
TIMED = (*CLOCKS, "sync/*", "checkpoint/*", "pipeline/*")
"""Keys of a row that measure time, or that say how the weights travelled; all others must be equal."""
NOT_COMPARED = ("manifest.json", "metrics.jsonl", "books.json")  # they hold attempt numbers and times
SHOWN = {"rollout_actor": "engine", "engine_core": "engine", "trainer_rank": "trainer rank"}
PROGRESS = ("step", "eval", "weight_sync")
Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """What the undisturbed run did."""

    rows: list[Row]
    files: dict[str, str]


@dataclass(frozen=True)
class Hit:
    """One kill and what came of it; times in seconds after it."""

    kill: Kill
    run: str
    finished: bool
    equal: bool
    lost_steps: int
    wrong_prompts: int
    """Steps of the run that trained on other prompts than the undisturbed one: doubled or skipped ones show here."""
    noticed: float | None
    serving: float | None


@dataclass(frozen=True)
class Verdict:
    """One run. `problems` is empty if all is well."""

    run: str
    hits: tuple[Hit, ...]
    problems: tuple[str, ...]
    starts: tuple[Start, ...]
    slept: float = 0.0
    """Seconds by which the calls of a slowed run took longer, all together."""


def rows_of(path: Path) -> list[Row]:
    """Rows of a .jsonl file; the half line of a killed run is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.endswith("}"):
            rows.append(json.loads(line))
    return rows


def results(run_dir: Path) -> list[Row]:
    """Steps and evaluations, without what measures time."""
    return [
        {key: value for key, value in row.items() if not any(fnmatchcase(key, timed) for timed in TIMED)}
        for row in rows_of(run_dir / "metrics.jsonl")
        if row["event"] in ("step", "eval")
    ]


def state_files(run_dir: Path) -> dict[str, str]:
    """sha256 of every file of the last checkpoint that has to be the same in two equal runs."""
    checkpoints = run_dir / "checkpoints"
    newest = max((path for path in checkpoints.glob("step_*") if path.name[5:].isdecimal()), default=checkpoints)
    files = [path for path in newest.rglob("*") if path.is_file() and path.name not in NOT_COMPARED]
    return {
        f"{newest.name}/{path.relative_to(newest)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def reference(run_dir: Path) -> Reference:
    return Reference(results(run_dir), state_files(run_dir))


def judge(seen: Seen, wanted: Reference, exact: bool = True) -> Verdict:
    """Not `exact`: the same prompts in the same order; where a switch falls between tokens is another each time."""
    found, files = results(seen.run_dir), state_files(seen.run_dir)
    equal_rows, equal_files = found == wanted.rows, files == wanted.files and bool(files)
    if not exact:
        equal_rows, equal_files = prompts(found) == prompts(wanted.rows), files.keys() == wanted.files.keys()
    problems = [f"{kill.spec} did not strike" for kill in seen.missed]
    problems += [
        f"start {number} left {', '.join(start.left)}" for number, start in enumerate(seen.starts) if start.left
    ]
    problems += [f"left in shared memory: {name}" for name in seen.shm]
    if not seen.finished:
        codes = [start.code for start in seen.starts]
        problems.append(f"not finished: exit codes {codes} (None: hung); {seen.errors.strip()[-500:]}")
    if not equal_rows:
        problems.append(f"other rows: {difference(found, wanted.rows)}")
    if not equal_files:
        problems.append(f"other files: {sorted(set(files.items()) ^ set(wanted.files.items()))}")
    if refutation := audited(seen.run_dir):
        problems.append(f"audit: {refutation}")
    wrong = wrong_prompts(found, wanted.rows)
    lost = lost_steps(seen)
    hits = [
        Hit(kill, seen.scenario.name, seen.finished, equal_rows and equal_files, lost.get(kill, 0), wrong, *times)
        for kill, times in timings(seen).items()
    ]
    return Verdict(seen.scenario.name, tuple(hits), tuple(problems), tuple(seen.starts))


def audited(run_dir: Path) -> str:
    """What `grpo audit` says against a run."""
    if not (run_dir / "config.yaml").exists():  # rows that a test of this file has made up
        return ""
    try:
        audit(run_dir)
    except GrpoError as error:
        return str(error)
    return ""


def difference(found: list[Row], wanted: list[Row]) -> str:
    """The first row that differs."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
        keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
        if keys:
            return (
                f"row {number}, {other['event']} {other['step']}: {[(k, one.get(k), other.get(k)) for k in keys][:3]}"
            )
    return f"{len(found)} rows instead of {len(wanted)}"


def prompts(rows: list[Row]) -> list[tuple[int, str]]:
    """Steps in order, with the digest of their prompts."""
    return [(row["step"], row["prompts"]) for row in rows if row["event"] == "step"]


def wrong_prompts(found: list[Row], wanted: list[Row]) -> int:
    return len(set(prompts(found)) ^ set(prompts(wanted))) + len(prompts(found)) - len(set(prompts(found)))


def lost_steps(seen: Seen) -> dict[Kill, int]:
    """Finished steps that were made again, each with the kill that cost it: the last before the run went back.

    The rows of one such return are in one file, written in that moment.
    """
    lost: dict[Kill, int] = {}
    by_time = sorted(seen.struck, key=seen.struck.__getitem__)
    for file in (seen.run_dir / "superseded").glob("metrics-*.jsonl") if by_time else ():
        before = [kill for kill in by_time if seen.struck[kill] <= file.stat().st_mtime] or by_time[:1]
        kill = next((kill for kill in reversed(before) if kill.role in HARD), before[-1])
        lost[kill] = lost.get(kill, 0) + sum(row["event"] == "step" for row in rows_of(file))
    return lost


def all_rows(run_dir: Path) -> list[Row]:
    """Also those that were taken out, in the order of their times."""
    files = [run_dir / "metrics.jsonl", *(run_dir / "superseded").glob("metrics-*.jsonl")]
    rows = {json.dumps(row, sort_keys=True): row for file in files for row in rows_of(file)}
    return sorted(rows.values(), key=lambda row: row["time"])


def timings(seen: Seen) -> dict[Kill, tuple[float | None, float | None]]:
    """Seconds from each kill until it was noticed and until the run got on again."""
    rows = [row for row in all_rows(seen.run_dir) if row["event"] in PROGRESS]
    found: dict[Kill, tuple[float | None, float | None]] = {}
    for kill, at in sorted(seen.struck.items(), key=lambda pair: pair[1]):
        noticed = noticed_at(kill, at, seen)
        since = noticed if noticed is not None else at
        serving = first(row["time"] for row in rows if row["time"] >= since)
        if kill.role == "reward_worker":
            serving = noticed
        found[kill] = tuple(None if when is None else max(0.0, when - at) for when in (noticed, serving))
    return found


def noticed_at(kill: Kill, at: float, seen: Seen) -> float | None:
    """The exit of a driver, the first word about a lost engine or rank, the first new reward worker."""
    if kill.role in ("controller", "gcs"):
        return first(start.ended for start in seen.starts if start.ended >= at)
    if kill.role == "reward_worker":
        before = [known.get(kill.role) for when, known in seen.published if when <= at]
        return first(when for when, known in seen.published if when > at and known.get(kill.role) != before[-1])
    said = re.compile(rf"\b{SHOWN[kill.role]}\b")
    return first(when for when, line in seen.lines if when >= at - 0.05 and said.search(line) and "stacks" not in line)


def first(values: Iterable[float]) -> float | None:
    return next(iter(values), None)


def most_lost(kill: Kill, every: int) -> int:
    """Finished steps that a kill may cost: the interval, and as many that were made beside the commit under way."""
    return 0 if kill.role in SOFT else 2 * every
