"""`grpo k8s fetch`: by the command of the chart's own notes; whole and compared, or nothing at all."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError, ResultsError
from grpo.kubernetes import results
from grpo.kubernetes.release import Release, find
from grpo.kubernetes.results import Place, fetch, place_of
from grpo.kubernetes.tools import Cluster
from tests.charts.test_lookup import notes
from tests.kubernetes.programs import BAD, DONE, RUNNING, Answer, Programs, job

FILES = {
    "policy/config.json": b"{}",
    "policy/model.safetensors": b"w" * 50_000,
    "report.html": b"<p>",
    "metrics.jsonl": b"{}\n",
}
COMMAND = 'kubectl -n team run mine-results -i --rm --image=x --overrides=\'{"spec": {"a": "b c"}}\''
NOTES = f"To have them here:\n  mkdir OUT && echo | {COMMAND} | tar x -C OUT\n"


def packed(files: dict[str, bytes], manifest: bool = False, run: str = "mine-grpo-1a") -> bytes:
    """The tar that the pod writes."""
    if manifest:
        records = [{"name": n, "size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in FILES.items()]
        files = files | {"manifest.json": json.dumps({"run": run, "files": records}).encode()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def ready(programs: Programs, tar: bytes, status: Answer = DONE, **more: object) -> Release:
    programs.items("get rayjobs", [job("mine", **status)])
    (programs.folder / "tar").write_bytes(tar)
    programs.answer(" run ", {"file": "tar", **more})
    programs.answer("get notes", {"out": NOTES})
    programs.answer("delete pod", {})
    return find(Cluster(), None)


@pytest.mark.parametrize("manifest", [False, True])
def test_results_come_by_the_command_of_the_notes(manifest: bool, programs: Programs, tmp_path: Path) -> None:
    one, out, said = ready(programs, packed(FILES, manifest)), tmp_path / "new" / "OUT", []
    fetch(one, out, said.append, 30)
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    assert said == [f"{out}: policy, report.html and metrics.jsonl of run mine-grpo-1a"]
    assert [path.name for path in out.parent.iterdir()] == ["OUT"]
    (words,) = programs.calls("run")
    assert words[:4] == ["kubectl", "-n", "team", "run"] and words[4].startswith("mine-results-")
    assert words[5:] == ["-i", "--rm", "--image=x", '--overrides={"spec": {"a": "b c"}}']
    assert programs.calls("delete") == []


GOOD = packed(FILES, True)
BROKEN = {
    "is missing": (packed({name: FILES[name] for name in list(FILES)[:2]}), {}),
    "policy/model.safetensors has 3 bytes, other ones": (
        packed(FILES | {"policy/model.safetensors": b"www"}, True),
        {},
    ),
    "are those of other": (packed(FILES, True, "other"), {}),
    "no whole tar": (GOOD[:30_000], {}),
    "exit code 0: no whole tar": (b"", {}),
    "exit code 3: No space left on the volume": (GOOD, {"code": 3, "err": "No space left on\nthe volume\n"}),
}


@pytest.mark.parametrize("part", BROKEN)
def test_what_is_not_whole_is_told_and_leaves_nothing(part: str, programs: Programs, tmp_path: Path) -> None:
    tar, more = BROKEN[part]
    one = ready(programs, tar, **more)
    with pytest.raises(ResultsError) as raised:
        fetch(one, tmp_path / "OUT", print, 30)
    assert part in str(raised.value) and raised.value.exit_code == 19
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_path_that_leads_out_of_the_folder_is_not_taken(programs: Programs, tmp_path: Path) -> None:
    one = ready(programs, packed(FILES | {"../evil": b"x"}))
    with pytest.raises(ResultsError, match="no whole tar"):
        fetch(one, tmp_path / "OUT", print, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_pod_that_does_not_end_is_taken_away(programs: Programs, tmp_path: Path) -> None:
    one = ready(programs, GOOD[:10_000], seconds=60)
    with pytest.raises(DeadlineExceeded, match="results must come within 0.5 s"):
        fetch(one, tmp_path / "OUT", print, 0.5)
    ((*_, name, ignore, wait),) = programs.calls("delete")
    assert (name, ignore, wait) == (programs.calls("run")[0][4], "--ignore-not-found", "--wait=false")


@pytest.mark.parametrize(
    ("status", "kind", "part"),
    [
        (RUNNING, ClusterError, "Running RUNNING; `grpo k8s logs -f mine` shows"),
        ({}, ClusterError, "release mine: New"),
        (
            BAD,
            ResultsError,
            "Complete STOPPED: exit code 2: a retry would end alike error: data.source; mend the cause",
        ),
    ],
)
def test_a_run_that_is_not_done_has_none(
    status: Answer, kind: type[GrpoError], part: str, programs: Programs, tmp_path: Path
) -> None:
    one = ready(programs, GOOD, status)
    with pytest.raises(kind, match="results are there once a run has SUCCEEDED, but run mine-grpo-1a") as raised:
        fetch(one, tmp_path / "OUT", print, 30)
    assert part in str(raised.value) and programs.calls("run") == []


def test_what_is_there_already_stays(programs: Programs, tmp_path: Path) -> None:
    one, out = ready(programs, GOOD), tmp_path / "OUT"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match="must be a folder to make, but is there already"):
        fetch(one, out, print, 30)
    assert [path.name for path in out.iterdir()] == ["mine"] and programs.calls("run") == []
    (out / "mine").unlink()
    fetch(one, out, lambda _: None, 30)  # an empty one is none
    assert (out / "report.html").read_bytes() == b"<p>"


def test_results_in_a_bucket_come_as_by_grpo_fetch(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, items = ready(programs, GOOD), []
    programs.answer("get notes", {"out": "To have them here:\n  grpo fetch s3://b/p/mine-grpo-1a OUT\n"})
    monkeypatch.setattr(results, "fetch_url", lambda item, say: items.append((item.url, item.folder)))
    fetch(one, tmp_path / "OUT", print, 30)
    assert items == [("s3://b/p/mine-grpo-1a", str(tmp_path / "OUT"))]


def test_a_chart_without_a_place_for_results(programs: Programs, tmp_path: Path) -> None:
    one = ready(programs, GOOD)
    programs.answer("get notes", {"out": "Run x as RayJob y\n"})
    with pytest.raises(ResultsError, match="set results.url, and helm upgrade"):
        fetch(one, tmp_path / "OUT", print, 30)


@given(st.text())
def test_any_notes_are_read(notes: str) -> None:
    found = place_of(notes)
    assert found is None or found.url or found.arguments


PLACES = {
    "{}": Place(namespace="team", arguments=("run", "grpo-results")),
    '{"results": {"claim": "out", "path": "a"}}': Place(namespace="team", arguments=("run", "grpo-results")),
    '{"results": {"url": "s3://bucket/p"}}': Place(url="s3://bucket/p/r"),
    '{"config": {"checkpoint": {"dir": "s3://bucket/p"}}}': None,
}


@pytest.mark.parametrize("values", PLACES)
def test_the_charts_notes_are_understood(values: str, tmp_path: Path) -> None:
    tree = {"lookup": False, **json.loads(values)}
    tree.setdefault("config", {}).setdefault("run", {})["name"] = "r"
    found, wanted = place_of(notes(tmp_path, tree)), PLACES[values]
    if wanted is None or wanted.url:
        assert found == wanted
    else:
        assert found and (found.namespace, found.arguments[:2]) == (wanted.namespace, wanted.arguments)
        (overrides,) = [word for word in found.arguments if word.startswith("--overrides=")]
        assert json.loads(overrides.partition("=")[2])["spec"]["containers"][0]["stdin"] is True
