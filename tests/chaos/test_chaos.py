"""The sweep of kills is whole; a few of its kills, and some of the real stack. All of them: make chaos."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grpo.observe.metrics import PHASES as PHASES_OF_THE_LOOP
from grpo.run.faults import POINTS
from tests.chaos.actors import FakeRankActor
from tests.chaos.judge import Hit, Reference, Verdict, difference, judge, lost_steps, reference, results
from tests.chaos.plan import HARD, PHASES, ROLES, SOFT, Kill, Scenario, quick, real, slowed, sweep
from tests.chaos.report import missed_targets, spread
from tests.chaos.slow import SlowRankActor, moment
from tests.chaos.supervisor import Seen, Start

ROOT = Path(__file__).parents[2]


def points_in(tree: ast.AST) -> list[object]:
    """First arguments of all calls of fault_point."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if "fault_point" in (getattr(call.func, "id", ""), getattr(call.func, "attr", ""))]
    return [ast.literal_eval(call.args[0]) for call in named]


def test_the_list_of_fault_points_is_complete() -> None:
    files = [file for file in (ROOT / "grpo").rglob("*.py") if file.name != "faults.py"]
    passed = {point for file in files for point in points_in(ast.parse(file.read_text()))}
    edges = {f"{phase}.{edge}" for phase in PHASES_OF_THE_LOOP for edge in ("began", "ended")}  # passed by the recorder
    assert edges.isdisjoint(passed)
    assert passed | (edges & set(POINTS)) == set(POINTS)


def test_every_fault_point_belongs_to_one_phase() -> None:
    assert sorted(point for points in PHASES.values() for point in points) == sorted(POINTS)


def test_the_sweep_kills_each_role_at_each_point_with_each_seed() -> None:
    runs = sweep(ROLES, tuple(PHASES), seeds=2)
    kills = Counter((kill.point, kill.role, run.seed) for run in runs for kill in run.kills)
    assert set(kills) == {(point, role, seed) for point in POINTS for role in ROLES for seed in range(2)}
    assert sum(kills.values()) >= 240
    for run in runs:
        specs = [kill.struck for kill in run.kills]
        assert len(specs) == len(set(specs)), run.name


def test_kills_that_must_lose_nothing_have_runs_of_their_own() -> None:
    for run in sweep(ROLES, tuple(PHASES), seeds=2):
        if not run.name.startswith("resume"):
            roles = {kill.role for kill in run.kills}
            assert roles <= set(SOFT) or roles <= set(HARD)


def test_slowed_runs_have_names_and_times_of_their_own_and_one_to_three_engines() -> None:
    runs = slowed(6)
    assert len({run.name for run in runs}) == len({run.slow for run in runs}) == 6 and all(run.slow for run in runs)
    assert [run.overrides[0] for run in runs[:3]] == [f"rollout.engines={count}" for count in (2, 3, 1)]
    assert {run.seed for run in runs} == {0, 1}
    assert not any(run.slow for run in sweep(ROLES, tuple(PHASES), seeds=1))


def test_how_long_a_call_takes_follows_from_the_seed_and_the_place_alone() -> None:
    moments = [moment("1", "Engine", 0, call) for call in range(2000)]
    assert moments == [moment("1", "Engine", 0, call) for call in range(2000)]
    assert moments[0] != moment("2", "Engine", 0, 0) and 0 <= min(moments) < 1e-3
    assert 0.45 < max(moments) <= 0.5 and 0.08 < sum(moments) / len(moments) < 0.12


def test_verbs_are_slowed_but_signs_of_life_are_not() -> None:
    slow = {
        name for name, verb in inspect.getmembers(SlowRankActor, inspect.isfunction) if hasattr(verb, "__wrapped__")
    }
    assert {"step", "meet", "publish", "write", "load"} <= slow and not slow & {"ping", "close", "__init__"}
    assert not hasattr(FakeRankActor.step, "__wrapped__")


def test_kills_of_the_real_stack() -> None:
    kills = [kill for run in real() for kill in run.kills]
    assert Counter(kill.role for kill in kills) == dict.fromkeys(ROLES, 4)
    assert {kill.phase for kill in kills} == set(PHASES)


@pytest.mark.parametrize(
    ("kill", "spec"),
    [
        (Kill("rollout.ended", 4, "controller"), "rollout.ended@4:kill"),
        (Kill("rollout.ended", 4, "engine_core", 1), "rollout.ended@4:kill=engine_core/1"),
        (Kill("rollout.ended", 4, "engine_core", -1), "rollout.ended@4:kill=engine_core"),
        (Kill("train.forward", 4, "trainer_rank", 1), "train.forward@4/1:kill"),
        (Kill("train.forward", 4, "gcs", 1), "train.forward@4/0:kill=gcs/1"),
        (Kill("sync.tensor", 4, "trainer_rank", 1, "stop"), "sync.tensor@4/0:stop"),
    ],
)
def test_how_a_kill_is_said(kill: Kill, spec: str) -> None:
    assert kill.spec == spec


def row(step: int, time: float, prompts: str = "p", event: str = "step", **more: object) -> dict[str, object]:
    return {"event": event, "step": step, "time": time, "prompts": f"{prompts}{step}", **more}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def seen_run(run_dir: Path, rows: list[dict[str, object]], kills: dict[Kill, float], code: int = 0) -> Seen:
    write(run_dir / "metrics.jsonl", rows)
    write(run_dir / "checkpoints" / "step_000002" / "rank-0.json", [{"weights": 1}])
    seen = Seen(Scenario("x", 0, tuple(kills)), run_dir, struck=dict(kills))
    seen.starts.append(Start(0.0, 9.0, code, ()))
    return seen


def test_times_are_not_compared_and_all_else_is(tmp_path: Path) -> None:
    timed = {"phase/train": 1.0, "step/seconds": 2.0, "sync/bytes": 3.0, "train/seconds_forward": 4.0}
    write(tmp_path / "metrics.jsonl", [row(1, 5.0, **timed, **{"train/loss": 0.5}), row(0, 1.0, event="weight_sync")])
    assert results(tmp_path) == [{"event": "step", "step": 1, "prompts": "p1", "train/loss": 0.5}]


def test_a_run_that_did_the_same_passes_and_one_that_did_not_is_told_apart(tmp_path: Path) -> None:
    kill = Kill("rollout.ended", 2, "engine_core")
    good = judge(seen_run(tmp_path / "a", [row(1, 1.0), row(2, 2.0)], {kill: 1.5}), Reference([], {}))
    assert [problem.split(":")[0] for problem in good.problems] == ["other rows", "other files"]
    wanted = reference(tmp_path / "a")
    assert judge(seen_run(tmp_path / "b", [row(1, 7.0), row(2, 8.0)], {kill: 7.5}), wanted).problems == ()
    for rows in ([row(1, 1.0), row(2, 2.0, "q")], [row(1, 1.0), row(1, 1.1), row(2, 2.0)], [row(1, 1.0)]):
        verdict = judge(seen_run(tmp_path / "c", rows, {kill: 1.5}), wanted)
        assert len(verdict.problems) == 1 and verdict.hits[0].wrong_prompts > 0 and not verdict.hits[0].equal
    failed = judge(seen_run(tmp_path / "d", [row(1, 7.0), row(2, 8.0)], {kill: 7.5}, code=14), wanted)
    assert "not finished: exit codes [14]" in failed.problems[0]


def test_steps_that_were_made_again_are_blamed_on_the_kill_before_the_return(tmp_path: Path) -> None:
    first, second = Kill("train.forward", 3, "trainer_rank"), Kill("rollout.ended", 5, "gcs")
    soft = Kill("rollout.ended", 4, "engine_core")
    seen = seen_run(tmp_path, [row(1, 1.0)], {first: 3.0, soft: 4.5, second: 6.0})
    lost = tmp_path / "superseded"
    write(lost / "metrics-0000.jsonl", [row(1, 1.0), row(2, 2.0)])
    write(
        lost / "metrics-0001.jsonl", [row(4, 4.0), row(4, 4.1, event="eval"), row(5, 6.5)]
    )  # a dead head is noticed late
    for file, went_back in (("metrics-0000.jsonl", 3.5), ("metrics-0001.jsonl", 8.0)):
        os.utime(lost / file, (went_back, went_back))
    assert lost_steps(seen) == {first: 2, second: 2}
    alone = seen_run(tmp_path, [row(1, 1.0)], {soft: 4.5})
    assert lost_steps(alone) == {soft: 4}, "without another cause an engine's kill has to answer for it"


def test_the_first_difference_is_named() -> None:
    assert difference([row(1, 1.0)], [row(1, 1.0), row(2, 2.0)]) == "1 rows instead of 2"
    assert difference([row(1, 1.0, "q")], [row(1, 1.0)]) == "row 0, step 1: [('prompts', 'q1', 'p1')]"


def hit(role: str, lost: int) -> Hit:
    return Hit(Kill("rollout.ended", 4, role), "x", True, True, lost, 0, 0.1, 1.0)


@pytest.mark.parametrize(
    ("role", "lost", "missed"), [("engine_core", 0, 0), ("engine_core", 1, 1), ("gcs", 6, 0), ("gcs", 7, 1)]
)
def test_how_many_steps_a_kill_may_cost(role: str, lost: int, missed: int) -> None:
    assert len(missed_targets([Verdict("x", (hit(role, lost),), (), ())])) == missed


def test_percentiles() -> None:
    assert spread([]) is None and spread([2.0]) == (2.0, 2.0, 2.0)
    assert spread([float(value) for value in range(1, 102)]) == (51.0, 96.0, 101.0)


def chaos(out: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.chaos", "--out", str(out), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    file = out / ("real.json" if "--real" in arguments else "small.json")
    found: dict[str, object] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["flight"])  # the synchronous loop has the kills of the real stack; others: make chaos
def test_a_few_kills_of_every_role_change_nothing(mode: str, tmp_path: Path) -> None:
    kills = sum(len(run.kills) for run in quick())
    found = chaos(tmp_path, "--quick", "--mode", mode)
    assert found["all"]["kills"] == found["all"]["finished"] == found["all"]["equal"] == kills >= 10


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.timeout(1500)
def test_24_kills_of_the_real_stack_change_nothing(tmp_path: Path) -> None:
    found = chaos(tmp_path, "--real")
    assert found["all"]["kills"] == found["all"]["finished"] == found["all"]["equal"] == 24
