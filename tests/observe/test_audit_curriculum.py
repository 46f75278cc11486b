"""The audit makes the choices of a curriculum once more: what it proves, and that every forgery of them is found."""

import json
import shutil
from collections import Counter

import pytest
from typer.testing import CliRunner

from grpo.cli import app
from grpo.errors import AuditError
from grpo.observe.audit import audit
from tests.observe.audited import edit, rows, write, write_run
from tests.rollout.simulated import make_config
from tests.rollout.test_no_bias import Fate, run

AHEAD = {"prompts_per_step": 3, "samples_per_prompt": 2, "engines": 1}
RULE = {"curriculum": {"easy_fraction": 0.1, "hard_fraction": 0.2}}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The product with a curriculum; `quiet` keeps no samples, so the books alone say what was right."""
    found = {}
    for name, kept in (("shown", 4), ("quiet", 0)):
        found[name] = tmp_path_factory.mktemp(name) / "run"
        more = {"checkpoint": {"every": 2, "keep": 9}, "metrics": {"completions_per_step": kept}, "data": RULE}
        run(make_config(1, steps=10, rollout=AHEAD, **more), Fate(), found[name])
    return found


@pytest.fixture(params=["shown", "quiet"])
def whole(wholes, request, tmp_path):
    return shutil.copytree(wholes[request.param], tmp_path / "run")


def steps(found):
    return {row["step"]: row for row in found if row["event"] == "step"}


def skipping(found):
    """A row that has skipped turns, not the last."""
    return next(row for row in found if row["event"] == "step" and row["curriculum"]["not_drawn"] and row["step"] < 9)


def refused(run_dir, *words):
    with pytest.raises(AuditError) as told:
        audit(run_dir)
    assert [word for word in words if word not in str(told.value)] == [], str(told.value)
    assert "\n" not in str(told.value)


def test_skipped_turns_are_counted_and_named(whole):
    proof = audit(whole)
    said = Counter(tuple(turn) for row in steps(rows(whole)).values() for turn in row["curriculum"]["not_drawn"])
    assert proof.turns == said and proof.not_drawn == said.total() > 3
    assert (proof.prompts, proof.skipped, proof.notes) == (30, 0, [])
    assert proof.epochs == (30 + proof.not_drawn) // 7, "skipped turns are turns"
    told = CliRunner().invoke(app, ["audit", str(whole), "--skipped"])
    assert told.exit_code == 0
    lines = [line for line in told.stdout.splitlines() if ": skipped" in line]
    assert lines == [f"{name}: skipped {count} x, {why}" for (name, why), count in sorted(said.items())]
    assert ": skipped" not in CliRunner().invoke(app, ["audit", str(whole)]).stdout


def turn_missing(found):
    skipping(found)["curriculum"]["not_drawn"].pop()


def turn_added(found):
    skipping(found)["curriculum"]["not_drawn"].append(["fake:1", "easy"])


def other_reason(found):
    turn = skipping(found)["curriculum"]["not_drawn"][0]
    turn[1] = "hard" if turn[1] == "easy" else "easy"


def turn_as_prompt(found):
    """The prompt that was skipped is said to have been trained."""
    row = skipping(found)
    row["prompts"][0] = row["curriculum"]["not_drawn"].pop()[0]


def other_rule(found):
    for row in found:
        if row["event"] == "resume":
            row["curriculum"]["easy_fraction"] = 0.9


def no_rule(found):
    for row in found:
        if row["event"] == "resume":
            del row["curriculum"]


def earlier_clock(found):
    for row in found:
        if row["event"] == "resume":
            row["clock"]["staleness"] = 0


def impossible_rule(found):
    for row in found:
        if row["event"] == "resume":
            row["curriculum"]["hard_fraction"] = 0


def nothing_said(found):
    del steps(found)[4]["curriculum"]


def other_size(found):
    steps(found)[4]["curriculum"]["right"][0][1] = 3


def not_a_count(found):
    steps(found)[4]["curriculum"]["right"][0][0] = "2"


def more_right_than_there_are(found):
    steps(found)[2]["curriculum"]["right"][0] = [3, 2]


FORGERIES = [
    (turn_missing, "curriculum skips a turn"),
    (turn_added, "curriculum skips a turn", "'fake:1'"),
    (other_reason, "curriculum skips a turn"),
    (turn_as_prompt, "stands where"),
    (other_rule, ""),
    (no_rule, ""),
    (earlier_clock, ""),
    (impossible_rule, "a row is as a run writes it"),
    (nothing_said, "step 4"),
    (other_size, "other sizes"),
    (not_a_count, "a row is as a run writes it"),
    (more_right_than_there_are, "a row is as a run writes it"),
]


@pytest.mark.parametrize(
    ("forge", "words"), [(forge, words) for forge, *words in FORGERIES], ids=lambda x: getattr(x, "__name__", "")
)
def test_forgeries_whose_chain_and_seals_hold_are_found(whole, forge, words):
    found = rows(whole)
    forge(found)
    write(whole, found)
    refused(whole, *words)


@pytest.mark.parametrize("step", range(1, 10))
def test_a_pass_rate_that_is_not_that_of_the_rewards_is_found(whole, step):
    """By its samples, by the batch that a checkpoint holds, by what that knows of it, or by the next choice."""
    found = rows(whole)
    pair = steps(found)[step]["curriculum"]["right"][1]
    pair[0] = (pair[0] + 1) % 3
    write(whole, found)
    refused(whole)


def state_of(whole, step):
    folder = whole / f"checkpoints/step_{step:06d}"
    return folder, json.loads((folder / "state.json").read_text())


def test_a_checkpoint_that_knows_other_pass_rates_is_found(whole):
    folder, state = state_of(whole, 4)
    known = state["progress"]["prompts"]["curriculum"]
    known[next(iter(known))][-1][1] ^= 1
    edit(folder, "state.json", json.dumps(state).encode())
    refused(whole, "checkpoints/step_000004/state.json", "would choose other prompts")


@pytest.mark.parametrize("forged", [{}, None, {"fake:1": [[1, 5, 2]]}])
def test_a_checkpoint_that_forgot_them_or_is_damaged_is_found(whole, forged):
    folder, state = state_of(whole, 4)
    state["progress"]["prompts"]["curriculum"] = forged
    edit(folder, "state.json", json.dumps(state).encode())
    refused(whole, "checkpoints/step_000004/state.json")


def test_a_checkpoint_that_counted_other_turns_is_found(whole):
    folder, state = state_of(whole, 10)
    state["progress"]["prompts"]["skipped"] += 1
    edit(folder, "state.json", json.dumps(state).encode())
    refused(whole, "checkpoints/step_000010/state.json", "skip or repeat prompts")


def test_turns_that_are_skipped_without_a_curriculum_are_found(tmp_path):
    write_run(tmp_path)
    assert audit(tmp_path).turns == {}
    found = rows(tmp_path)
    steps(found)[2]["curriculum"] = {"not_drawn": [["abc:1", "easy"]]}
    write(tmp_path, found)
    refused(tmp_path, "step 2", "curriculum skips a turn")
