"""What an audit proves, and that every forgery is found and named."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from grpo.cli import app
from grpo.errors import AuditError, CheckpointError, GrpoError, NotProved
from grpo.observe.audit import audit
from grpo.observe.audit.lines import check_named
from grpo.observe.chain import short
from tests.observe.audited import Run, config, edit, rows, write, write_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("audit") / "run")


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def refused(run_dir, *words):
    with pytest.raises(AuditError) as told:
        audit(run_dir)
    assert [word for word in words if word not in str(told.value)] == [], str(told.value)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_whole_run_is_proved(whole):
    proof = audit(whole)
    assert vars(proof) == {
        **{"steps": 6, "prompts": 24, "epochs": 2, "skipped": 0, "not_drawn": 0, "samples": 48, "versions": 7},
        **{"evaluations": 4, "starts": 1, "checkpoints": 3, "notes": [], "turns": {}},
    }


def test_a_killed_run_says_what_is_not_proved_yet_and_its_resume_has_no_gap(tmp_path):
    Run(tmp_path, config()).to(3)
    assert "steps 3 to 3 are not sealed by a checkpoint yet" in audit(tmp_path).notes
    resumed = Run(tmp_path, config(), resumed=2, attempt=2)
    assert audit(tmp_path).steps == 2
    resumed.to(6).end()
    proof = audit(tmp_path)
    assert (proof.steps, proof.starts, proof.notes) == (6, 2, [])
    assert [
        json.loads(line)["step"] for line in (tmp_path / "superseded/books-0000.jsonl").open() if "prompts" in line
    ] == [3]


def test_a_killed_runs_half_line_is_not_proved_and_no_contradiction(run, tmp_path):
    path = tmp_path / "half"
    Run(path, config()).to(3)
    with (path / "books.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert "half written" in audit(path).notes[0]


def steps_of(found):
    return [place for place, row in enumerate(found) if row["event"] == "step"]


def version(row, number):
    return row | {"versions": [[8, [0, number]]], "weights": {str(number): f"digest {number}"}}


def old(found, at):
    found[at[3]] = version(found[at[3]], 2)


def future(found, at):
    found[at[3]] = version(found[at[3]], 4)


def prompt_twice(found, at):
    found[at[0]]["prompts"][1] = found[at[0]]["prompts"][0]


def prompt_missing(found, at):
    for key in ("prompts", "samples"):
        found[at[0]][key] = found[at[0]][key][1:]
    found[at[0]]["versions"] = [[6, [0, 0]]]


def exchanged(found, at):
    one, other = found[at[0]], found[at[1]]
    for key in ("prompts", "samples"):
        one[key], other[key] = other[key], one[key]


def no_sync(found, at):
    found[at[2]]["weights"] = {"2": "digest x"}


def twice(found, at):
    found.insert(at[2], found[at[2]])


def step_missing(found, at):
    del found[at[2]]


def other_run(found, at):
    found[at[4]]["prompts"] = ["xyz:1", "xyz:2", "xyz:3", "xyz:4"]


def odd_span(found, at):
    found[at[3]]["versions"] = [[8, [0, 3, 1, 2]]]


def sync_in_the_past(found, at):
    found[at[3]]["versions"], found[at[3]]["weights"] = [[8, [0, 99]]], {"99": "digest 99"}


FORGERIES = [
    (old, "books.jsonl:", "step 4", "version 2", "too old"),
    (future, "step 4", "version 4", "no engine could have it then"),
    (prompt_twice, "step 1", "stands where", "came twice"),
    (prompt_missing, "step 1", "stands where"),
    (exchanged, "step 1", "stands where"),
    (no_sync, "step 3", "'digest x' of version 2 is that of no sync"),
    (twice, "steps come once", "step 4 comes next"),
    (step_missing, "steps come once", "step 3 comes next"),
    (other_run, "step 5", "'xyz:1' stands where"),
    (odd_span, "step 4", "only take newer"),
    (sync_in_the_past, "step 4", "version 99"),
]


@pytest.mark.parametrize(
    ("forge", "words"), [(forge, words) for forge, *words in FORGERIES], ids=lambda x: getattr(x, "__name__", "")
)
def test_forgeries_whose_chain_and_seals_hold_are_named_by_the_rule_that_they_break(run, forge, words):
    found = rows(run)
    forge(found, steps_of(found))
    write(run, found)
    refused(run, *words)


def test_a_changed_row_breaks_the_chain_and_one_with_a_new_chain_the_seal(run):
    found = rows(run)
    place = steps_of(found)[2]
    path = run / "books.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[place] = lines[place].replace(found[place]["samples"][0][:6], "000000", 1)
    path.write_text("".join(lines))
    refused(run, f"books.jsonl:{place + 1}", "continues the chain")
    found[place]["samples"][0] = "0" * 32
    write(run, found, reseal=False)
    refused(run, "has another chain than checkpoints/step_000004")


def test_a_changed_reward_or_number_is_found_in_the_other_files(run):
    samples = run / "samples.jsonl"
    was = samples.read_text()
    samples.write_text(was.replace('"rewards": [1.0, 0.0]', '"rewards": [1.0, 1.0]', 1))
    refused(run, "samples.jsonl:", "has other bytes", "changed")
    samples.write_text(was)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"reward/mean": 0.5', '"reward/mean": 0.6', 1))
    refused(run, "metrics.jsonl:", "step 1 has other bytes")


FORGED = [("versions", [0, 7]), ("newest_versions", [7, 7]), ("weights", "digest 7"), ("weights", None)]


@pytest.mark.parametrize(  # the books do not hold which prompts an evaluation asks
    ("event", "key", "value"),
    [*((at, *of) for at in ("step", "eval") for of in FORGED), ("step", "prompt_id", "abc:99")],
)
def test_a_forged_row_of_samples_is_found_though_the_books_agree_with_its_bytes(run, event, key, value):
    path = run / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if f'"event": "{event}", "step": 2' in line)
    row = json.loads(lines[place])
    assert row["weights"] == f"digest {row['newest_versions'][-1]}"
    lines[place] = json.dumps({name: said for name, said in (row | {key: value}).items() if said is not None}) + "\n"
    path.write_text("".join(lines))
    found = rows(run)
    booked = next(row for row in found if (row["event"], row.get("step")) == (event, 2))
    own = [line for line in lines if f'"event": "{event}", "step": 2,' in line]
    booked["kept"] = [len(own), short("".join(own).encode())]
    write(run, found)
    refused(run, f"samples.jsonl:{place + 1}: a row of samples names the weights", key, "forged")


def test_rows_of_samples_say_which_weights_made_first_and_last_token(tmp_path):
    settings = config(rollout={"max_staleness": 2, "update": "in_flight"}, eval={"prompts": 0})
    run = Run(tmp_path, settings)
    run.train(0)
    run.train(1)
    groups = [
        replace(group, samples=(group.samples[0], replace(group.samples[1], versions=((0, 1), (1, 2)))))
        for group in run.groups(4, 1)
    ]
    run.train(groups=groups)
    run.end()
    assert audit(tmp_path).steps == 3
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[-1])
    assert (row["versions"], row["newest_versions"], row["weights"]) == ([1, 1], [1, 2], "digest 2")


@pytest.mark.parametrize(
    "name", ["books.jsonl", "metrics.jsonl", "samples.jsonl", "checkpoints/step_000004/state.json"]
)
def test_a_cut_file_is_found(run, name):
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(run, "step_000004" if "step_" in name else name)


def test_books_that_are_taken_away_are_missed(run):
    (run / "books.jsonl").unlink()
    refused(run, "books.jsonl", "taken away")


@pytest.mark.parametrize(("key", "value"), [("position", 1), ("epoch", 2), ("fingerprint", "f")])
def test_a_checkpoint_with_another_cursor_is_found(run, key, value):
    folder = run / "checkpoints/step_000004"
    state = json.loads((folder / "state.json").read_text())
    state["progress"]["prompts"][key] = value
    edit(folder, "state.json", json.dumps(state).encode())
    refused(run, "checkpoints/step_000004/state.json", "skip or repeat prompts")


def test_a_checkpoint_under_another_step_and_rows_that_it_does_not_share_are_found(run):
    folder = run / "checkpoints/step_000004"
    kept = (folder / "metrics.jsonl").read_text()
    edit(folder, "metrics.jsonl", kept.replace('"reward/mean": 0.5', '"reward/mean": 0.6', 1).encode())
    refused(run, "checkpoints/step_000004", "other lines of step 1")


def test_a_superseded_row_that_is_put_back_is_found(tmp_path):
    Run(tmp_path, config()).to(3)
    Run(tmp_path, config(), resumed=2, attempt=2).to(6).end()
    lost = (tmp_path / "superseded/metrics-0000.jsonl").read_text()
    row = next(line for line in lost.splitlines(keepends=True) if '"event": "step"' in line)
    metrics = tmp_path / "metrics.jsonl"
    was = metrics.read_text()
    metrics.write_text(was + row)
    refused(tmp_path, "metrics.jsonl:", "step 3")
    lines = [
        row if '"step": 3,' in line and '"event": "step"' in line else line for line in was.splitlines(keepends=True)
    ]
    metrics.write_text("".join(lines))
    refused(tmp_path, "metrics.jsonl:", "step 3 has other bytes")


def test_a_run_without_books_is_not_proved_and_one_that_lost_them_says_from_where(run, tmp_path):
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    (run / "books.jsonl").unlink()
    with pytest.raises(NotProved, match="needs books.jsonl"):
        audit(run)
    late = tmp_path / "late"
    Run(late, config()).to(2)
    (late / "books.jsonl").unlink()
    Run(late, config(), resumed=2, attempt=2).to(6).end()
    shutil.rmtree(late / "checkpoints/step_000002")
    with pytest.raises(NotProved, match="begin behind step 2"):
        audit(late)


def test_skipped_and_dropped_prompts_have_their_places(tmp_path):
    run = Run(tmp_path, config(rollout={"refill": True}))
    first, second = run.groups(3, 0), run.groups(1, 0, equal=True)
    run.train(0, [*first, *run.groups(1, 0)], tuple(second))
    run.dropped = 1
    lost, *kept = run.groups(4, 1)
    run.train(1, kept)
    run.commit()
    proof = audit(tmp_path)
    assert (proof.prompts, proof.skipped) == (7, 2)
    found = rows(tmp_path)
    found[steps_of(found)[0]]["skipped"] = [[lost.prompt.id, 1.0]]
    write(tmp_path, found)
    refused(tmp_path, "step 1", "stands where")


@pytest.mark.parametrize("update", ["between_batches", "in_flight"])
def test_versions_of_batches_that_are_drawn_ahead(tmp_path, update):
    settings = config(rollout={"max_staleness": 2, "update": update}, eval={"prompts": 0})
    run = Run(tmp_path, settings)
    for version_of_it in (0, 0, 0, 2 if update == "in_flight" else 1):
        run.train(version_of_it)
    run.commit()
    assert audit(tmp_path).steps == 4
    found = rows(tmp_path)
    at = steps_of(found)
    found[at[3]] = version(found[at[3]], 0 if update == "in_flight" else 2)
    write(tmp_path, found)
    refused(tmp_path, "step 4", "clock allows")
    resumed = Run(tmp_path, settings, resumed=4, attempt=2)
    resumed.train(2)
    resumed.train(3)
    resumed.train(4)


def test_syncs_behind_a_checkpoint_stay_known_to_what_it_holds(tmp_path):
    settings = config(rollout={"max_staleness": 1}, eval={"prompts": 0})
    run = Run(tmp_path, settings)
    run.train(0)
    run.train(0)
    run.commit()
    run.train(1)
    resumed = Run(tmp_path, settings, resumed=2, attempt=2)
    resumed.train(1)
    resumed.commit()
    assert audit(tmp_path).steps == 3
    carried = [row["version"] for row in rows(tmp_path) if row.get("carried")]
    assert carried == [2, 3]


@pytest.mark.parametrize("name", ["books.jsonl", "metrics.jsonl", "samples.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "noise"])
def test_hostile_folders_are_refused_in_a_sentence(run, name, kind):
    path = run / name
    path.unlink()
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "noise": lambda path: path.write_bytes(b"\x00\xff{[" * 100 + b"\n")}
    make[kind](path)
    with pytest.raises(GrpoError) as told:
        audit(run)
    assert "\n" not in str(told.value) or name == "config.yaml"


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.yaml"):
        audit(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"event": "x"},
        {"event": "__init__"},
        {"event": "sync", "version": -1, "digest": "x"},
        {"event": "resume", "step": 6},
    ],
)
def test_rows_that_no_run_writes_are_refused(run, row):
    write(run, [*rows(run), row])
    refused(run, "a row is as a run writes it")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), change=st.sampled_from(["set", "insert", "delete"]), byte=st.integers(0, 255))
def test_any_change_of_a_byte_of_the_books_is_found(whole, place, change, byte):
    path = whole / "books.jsonl"
    was = path.read_bytes()
    place %= len(was)
    new = bytes([byte]) if change != "delete" else b""
    forged = was[:place] + new + was[place + (change != "insert") :]
    try:
        path.write_bytes(forged)
        if forged != was:
            with pytest.raises(AuditError):
                audit(whole)
    finally:
        path.write_bytes(was)


def test_the_command_says_what_was_proved_or_ends_with_its_own_code(run):
    told = CliRunner().invoke(app, ["audit", str(run)])
    assert told.exit_code == 0 and "nothing contradicts" in told.stdout and "checkpoints" in told.stdout
    (run / "books.jsonl").unlink()
    assert CliRunner().invoke(app, ["audit", str(run)]).exit_code == 17


def test_rows_of_a_program_that_did_not_write_their_newest_weights_are_compared_in_what_they_have():
    spans = (((0, 1),), ((0, 1), (2, 2)))
    row = {"versions": [1, 1], "prompt_id": "a"}
    check_named([("samples.jsonl line 1", json.dumps(row).encode())], spans, {"2": "digest"}, ["a"])
    with pytest.raises(AuditError, match="its versions are"):
        check_named([("samples.jsonl line 1", json.dumps(row | {"versions": [0, 1]}).encode())], spans, {}, ["a"])
    with pytest.raises(AuditError, match="its weights are"):
        forged = row | {"newest_versions": [1, 2], "weights": "other"}
        check_named([("samples.jsonl line 1", json.dumps(forged).encode())], spans, {"2": "digest"}, ["a"])
