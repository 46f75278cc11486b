"""A long run of the real stack with a kill every few minutes: does anything grow? `make soak`.

Every few seconds it looks at every role's processes (memory, file descriptors, threads), at the run's folder and at
/metrics. Growth is a line through the samples of each process after its first minute, weighted by how long it lived: a
replaced process starts anew, so what grows over the whole run (disk, series, shared memory) is told apart.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
KILLED = ("engine_core", "trainer_rank", "reward_worker", "rollout_actor", "controller")
SAMPLE_SECONDS, WARM_UP_SECONDS, PORT = 5.0, 60.0, 18090
OVERRIDES = (
    "model.dtype=bfloat16",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "train.minibatches=1",
    "train.learning_rate=1e-5",
    "eval.prompts=32",
    "eval.every=50",
    "checkpoint.every=10",
    "run.lease_seconds=10",
    "deadlines.health=20",
    "rewards.0.function=examples.rewards:mentions_answer",
    f"metrics.port={PORT}",
)


@dataclass
class Series:
    """(seconds, value) of one process or of the whole run."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def growth(self) -> float | None:
        """Per hour, after the warm-up; None if there is too little to fit a line to."""
        points = [point for point in self.points if point[0] - self.points[0][0] >= WARM_UP_SECONDS]
        if len(points) < 12:
            return None
        slope, _ = statistics.linear_regression(*zip(*points, strict=True))
        return slope * 3600

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Watch:
    def __init__(self, run_dir: Path, pids: Path) -> None:
        self.run_dir, self.pids = run_dir, pids
        self.began = time.monotonic()
        self.processes: dict[tuple[str, str, int], Series] = defaultdict(Series)
        self.whole: dict[str, Series] = defaultdict(Series)

    def sample(self) -> None:
        now = time.monotonic() - self.began
        for role, pid in roles(self.pids):
            for kind, value in numbers(pid):
                self.processes[role, kind, pid].points.append((now, value))
        files = [path for path in self.run_dir.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
        self.whole["run folder without checkpoints, MB"].points.append((now, sum(map(size, files)) / 1e6))
        kept = list((self.run_dir / "checkpoints").rglob("*")) if (self.run_dir / "checkpoints").exists() else []
        self.whole["checkpoints, MB"].points.append((now, sum(map(size, kept)) / 1e6))
        shared = [path for path in Path("/dev/shm").glob("*") if path.is_file()]
        self.whole["/dev/shm files"].points.append((now, float(len(shared))))
        if (series := metric_series()) is not None:
            self.whole["metric series"].points.append((now, float(series)))


def roles(pids: Path) -> Iterator[tuple[str, int]]:
    try:
        known = json.loads(pids.read_text())
    except (OSError, ValueError):
        return
    for role, handles in known.items():
        yield from ((role, pid) for pid in handles)


def numbers(pid: int) -> Iterator[tuple[str, float]]:
    try:
        process = psutil.Process(pid)
        yield "memory, MB", process.memory_full_info().pss / 1e6
        yield "files", float(process.num_fds())
        yield "threads", float(process.num_threads())
    except psutil.Error:
        return


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def metric_series() -> int | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=2) as page:
            return sum(not line.startswith(b"#") for line in page)
    except (urllib.error.URLError, OSError):
        return None


def steps_done(run_dir: Path) -> int:
    """The last finished step."""
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except OSError:
        return 0
    return max(map(int, re.findall(r'"event": "step", "step": (\d+)', text)), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with kills; prints what grows.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kill-every", type=float, default=150, help="Seconds between two kills.")
    parser.add_argument("--out", type=Path, default=ROOT / ".build/soak")
    options = parser.parse_args()
    out = options.out / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    run_dir = out / "run"
    environment = os.environ | {"GRPO_FAULT_DIR": str(out)}
    command = [sys.executable, "-m", "grpo", "train", "examples/quickstart.yaml", *OVERRIDES]
    command += [f"run.dir={run_dir}", f"run.steps={options.steps}"]
    watch, victims, kills, starts = Watch(run_dir, out / "pids.json"), itertools.cycle(KILLED), [], 0
    driver: subprocess.Popen[bytes] | None = None
    next_kill = options.kill_every
    with open(out / "output.txt", "wb") as output:
        while (passed := time.monotonic() - watch.began) < options.minutes * 60:
            if driver is None or driver.poll() not in (None, 0):
                driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
                starts += 1
            if driver.poll() == 0:
                break
            watch.sample()
            if passed > next_kill and steps_done(run_dir):
                role, next_kill = next(victims), passed + options.kill_every
                for _, pid in [found for found in roles(out / "pids.json") if found[0] == role][:1]:
                    psutil.Process(pid).kill()
                    kills.append(role)
                    print(f"{passed:6.0f} s, step {steps_done(run_dir)}: killed the {role}", flush=True)
            time.sleep(SAMPLE_SECONDS)
        done = driver is not None and driver.poll() == 0
        if driver is not None and not done:
            driver.terminate()
            driver.wait(60)
    report(watch, out, {"seconds": round(passed), "steps": steps_done(run_dir), "kills": len(kills), "starts": starts})
    return 0 if done or driver is not None and driver.returncode == 11 else 1


def report(watch: Watch, out: Path, head: dict[str, int]) -> None:
    """Prints the tables and writes them to soak.json."""
    print(", ".join(f"{name}: {value}" for name, value in head.items()))
    table = Table("role", "of", "processes", "at the end", "growth per hour", "of its level")
    rows = []
    for role, kind in sorted({key[:2] for key in watch.processes}):
        mine = [series for key, series in watch.processes.items() if key[:2] == (role, kind)]
        fitted = [(series, growth) for series in mine if (growth := series.growth()) is not None]
        weights = [len(series.points) for series, _ in fitted]
        growth = sum(g * w for (_, g), w in zip(fitted, weights, strict=True)) / sum(weights) if fitted else None
        rows.append({"role": role, "of": kind, "processes": len(mine), "last": mine[-1].last, "growth": growth})
    for kind, series in watch.whole.items():
        rows.append({"role": "run", "of": kind, "processes": 1, "last": series.last, "growth": series.growth()})
    for row in rows:
        share = f"{row['growth'] / row['last']:+.1%}" if row["growth"] is not None and row["last"] else ""
        shown = "too short" if row["growth"] is None else f"{row['growth']:+.2f}"
        table.add_row(row["role"], row["of"], str(row["processes"]), f"{row['last']:.1f}", shown, share)
    Console(width=120).print(table)
    (out / "soak.json").write_text(json.dumps(head | {"rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
