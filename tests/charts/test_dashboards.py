"""The dashboards: as generated, by Grafana's rules, and with no metric, label or query that does not exist."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate import dashboards
from charts.generate.thirdparty import SCRAPED, THIRD_PARTY
from grpo.observe.metrics import CATALOGUE
from tests.rules import ROOT, alerts, kind, metric_labels, promtool, render

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(dashboards.FOLDER.glob("*.json"))}
PANELS = [
    pytest.param(panel, id=f"{name}-{panel['id']}")
    for name, board in BOARDS.items()
    for panel in dashboards.panels(board)
]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Numbers that have no unit
PLAIN = {"Loss", "Gradient norm", "Chi-square"}
COUNTED = "engines requests requests/min workers steps alerts steps/h starts points nats nats/token × versions syncs"
COUNTED += " updates/min batches syncs/h times targets GPUs replacements pods actors groups workloads workloads/h"
UNITS = {f"suffix:{what}" for what in COUNTED.split()} | {"suffix:per min", "prefix:#", "prefix:XID "}
UNITS |= {"count:tokens", "count:tokens/s", "reqps", "s", "bytes", "Bps", "percent", "percentunit", "sci", "short"}
UNITS |= {"string", "bool_on_off", "dateTimeFromNow", "watt", "celsius"}


def known_metrics() -> dict[str, set[str]]:
    """Every series that an expression may name, with the labels that it has."""
    known: dict[str, set[str]] = {}
    rows = [(metric.name, metric.kind, metric.labels) for metric in CATALOGUE]
    rows += [(name, foreign.kind, foreign.labels) for foreign in THIRD_PARTY for name in foreign.names]
    for name, sort, labels in rows:
        for suffix in ("_bucket", "_sum", "_count") if sort == "histogram" else ("",):
            known[name + suffix] = {*labels, *SCRAPED, *({"le"} if suffix == "_bucket" else ())}
    return known


def expressions(board: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboards.panels(board) for target in panel["targets"]]
    return panels + [mark["expr"] for mark in board["annotations"]["list"]]


def everything() -> dict[str, list[str]]:
    """Expressions by where they stand: each dashboard, each alert."""
    found = {name: expressions(board) for name, board in BOARDS.items()}
    return found | {name: [alert["expr"]] for name, alert in alerts(render()).items()}


def used() -> set[str]:
    return {metric for texts in everything().values() for text in texts for metric, _ in metric_labels(text)}


def test_dashboards_are_generated() -> None:
    """`make dashboards` was run."""
    wanted = dashboards.dashboards()
    assert sorted(wanted) == ["engines.json", "infrastructure.json", "overview.json", "pipeline.json"]
    assert {path.name for path in dashboards.FOLDER.iterdir()} == set(wanted)
    for name, text in wanted.items():
        assert (dashboards.FOLDER / name).read_text() == text, f"{name} is old: make dashboards"


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_follows_the_rules(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == f"grpo-{name}" and len(board["uid"]) <= 40
    assert "id" not in board and 39 <= board["schemaVersion"] <= 41
    assert "grpo" in board["tags"] and board["description"]
    assert [link["type"] for link in board["links"]] == ["dashboards", "link"]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables.pop("datasource")["type"] == "datasource"
    assert set(variables) >= {"namespace", "run"}
    for variable in variables.values():
        assert variable["multi"] and variable["includeAll"] and variable["allValue"] == ".+"
        assert variable["datasource"] == DATASOURCE
    ids = [panel["id"] for row in board["panels"] for panel in [row, *(row.get("panels") or [])]]
    assert len(ids) == len(set(ids))
    assert board["panels"][0]["title"] == "Now"
    assert all(panel["type"] == "stat" for panel in board["panels"][1:7])


@pytest.mark.parametrize("panel", PANELS)
def test_panel_follows_the_rules(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    plain = panel["fieldConfig"]["defaults"]["unit"] == "short"
    assert plain == (panel["title"] in PLAIN), "a number without a unit is an exception that is named"
    names = panel["type"] == "stat" and panel["options"]["textMode"] == "name"
    assert names == (panel["fieldConfig"]["defaults"]["unit"] == "string")
    assert panel["fieldConfig"]["defaults"]["noValue"]
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        windows = re.findall(r"\[([\w$]+)\]", target["expr"])
        live = panel["type"] == "stat"
        assert all(window == "$__rate_interval" or live or window == "1h" for window in windows), target["expr"]
    names = {link["url"].rpartition("#")[2] for link in panel.get("links", [])}
    assert names <= {name.lower() for name in alerts(render())}


@pytest.mark.parametrize("name", BOARDS)
def test_marks_of_every_dashboard(name: str) -> None:
    marks = {mark["name"]: mark for mark in BOARDS[name]["annotations"]["list"]}
    assert list(marks) == ["Starts", "Recoveries", "Checkpoints", "Alerts"]
    for mark in marks.values():
        assert mark["enable"] is True and mark["datasource"] == DATASOURCE and mark["iconColor"]
        assert mark["target"]["expr"] == mark["expr"]
        labels = {*re.findall(r"{{(\w+)}}", mark["titleFormat"]), *mark["tagKeys"].split(",")}
        assert labels <= set(re.findall(r"\w+", re.findall(r"by \(([^)]*)\)", mark["expr"])[0]))
        # A moment is told in milliseconds; an alert lasts as long as its series.
        assert mark["useValueForTime"] is mark["expr"].endswith("* 1000")
        assert ("_timestamp_seconds" in mark["expr"]) is mark["useValueForTime"]


@pytest.mark.parametrize("name", BOARDS)
def test_a_row_that_needs_anothers_exporter_is_closed_and_says_so(name: str) -> None:
    for panel in BOARDS[name]["panels"]:
        inside = panel.get("panels") or []
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["noValue"] == "no data", panel["title"]
        assert bool(inside) is bool(panel.get("collapsed"))
        for each in inside:
            assert each["fieldConfig"]["defaults"]["noValue"].startswith("not scraped: "), each["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    places = [(BOARDS[name]["panels"], 0)]
    places += [(row["panels"], row["gridPos"]["y"] + 1) for row in BOARDS[name]["panels"] if row.get("panels")]
    for panels, top in places:
        check_places(panels, top)


def check_places(panels: list[dict[str, Any]], top: int) -> None:
    """None lies on another, and none above the row that it is in."""
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        assert panel["gridPos"]["y"] >= top
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_every_metric_and_label_exists() -> None:
    known = known_metrics()
    for place, texts in everything().items():
        for text in texts:
            for metric, labels in metric_labels(text):
                assert metric in known, f"{place}: {metric} is neither in CATALOGUE nor in THIRD_PARTY"
                assert set(labels) <= known[metric], f"{place}: {metric} has no label {set(labels) - known[metric]}"


def test_every_metric_of_the_catalogue_is_seen() -> None:
    seen = {re.sub("_(bucket|sum|count)$", "", name) for name in used()} | used()
    assert [metric.name for metric in CATALOGUE if metric.name not in seen] == []


def test_no_third_party_metric_is_listed_in_vain() -> None:
    seen = {re.sub("_(bucket|sum|count)$", "", name) for name in used()} | used()
    assert [name for foreign in THIRD_PARTY for name in foreign.names if name not in seen] == []


def test_grouping_labels_exist() -> None:
    """`by (...)` and legends name labels that a metric of the expression has."""
    known = known_metrics()
    for name, board in BOARDS.items():
        for panel in dashboards.panels(board):
            for target in panel["targets"]:
                labels = set().union(*(known[metric] for metric, _ in metric_labels(target["expr"])))
                grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                made = set(re.findall(r'label_replace\(.*?, "(\w+)", "', target["expr"]))
                assert grouped <= labels | made, f"{name}: {panel['title']}"
                assert legend <= grouped, f"{name}: {panel['title']}: {target['legendFormat']}"


def test_queries_are_promql(tmp_path: Path) -> None:
    """Each query as a recording rule that promtool checks, with what Grafana would fill in."""
    texts = [text for board in BOARDS.values() for text in expressions(board)]
    filled = [re.sub(r"\$(namespace|run|pod)\b", ".+", text).replace("$__rate_interval", "1m") for text in texts]
    assert not [text for text in filled if "$" in text.replace('"$1"', "")]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(filled)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool(), "check", "rules", tmp_path / "panels.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(texts)} rules found" in done.stdout


def shipped(*settings: str, namespace: str = "default", release: str = "grpo") -> dict[str, dict[str, Any]]:
    """The ConfigMaps of the dashboards by the name of their file."""
    documents = kind("ConfigMap", render(*settings, namespace=namespace, release=release))
    return {key: document for document in documents for key in document["data"] if key.endswith(".json")}


def text(files: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    ((_, document),) = [(key, found) for key, found in files.items() if key.startswith(f"grpo-{name}-")]
    board: dict[str, Any] = json.loads(next(iter(document["data"].values())))
    return board


def links(board: dict[str, Any]) -> list[str]:
    panels = [link["url"] for panel in dashboards.panels(board) for link in panel.get("links", [])]
    return panels + [link["url"] for link in board["links"] if link["type"] == "link"]


def test_dashboards_are_shipped() -> None:
    url = "https://wiki.example.com/runbooks"
    files = shipped("monitoring.dashboards.annotations.grafana_folder=GRPO", f"monitoring.runbookUrl={url}")
    assert set(files) == {f"grpo-{name}-default.json" for name in BOARDS}
    for name, board in BOARDS.items():
        document = files[f"grpo-{name}-default.json"]
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert document["metadata"]["annotations"] == {"grafana_folder": "GRPO"}
        made = text(files, name)
        assert links(made) == [link.replace("docs/runbooks.md", url) for link in links(board)]
        same = ("panels", "annotations", "description", "tags", "time", "refresh", "schemaVersion")
        assert {key: json.loads(json.dumps(made[key]).replace(url, "docs/runbooks.md")) for key in same} == {
            key: board[key] for key in same
        }
    assert shipped("monitoring.dashboards.enabled=false") == {}


def test_without_published_runbooks_nothing_links_to_them() -> None:
    files = shipped()
    assert [links(text(files, name)) for name in BOARDS] == [[]] * len(BOARDS)
    assert [link["type"] for name in BOARDS for link in text(files, name)["links"]] == ["dashboards"] * len(BOARDS)


def test_two_namespaces_have_dashboards_of_their_own_and_two_releases_of_one_the_same() -> None:
    """Grafana takes a uid, a title in a folder and a file of the sidecar once."""
    longest = "n" * 63
    made = [shipped(namespace=name) for name in ("team-a", longest)]
    for name in BOARDS:
        boards = [text(files, name) for files in made]
        for key in ("uid", "title"):
            assert len({board[key] for board in boards}) == 2
        assert all(len(board["uid"]) <= 40 for board in boards)
        (chosen,) = [one["current"] for one in boards[0]["templating"]["list"] if one["name"] == "namespace"]
        assert chosen == {"text": ["team-a"], "value": ["team-a"]}
    assert len({file for files in made for file in files}) == 2 * len(BOARDS)
    first, second = made[0], shipped(namespace="team-a", release="two")
    assert {file: document["data"] for file, document in first.items()} == {
        file: document["data"] for file, document in second.items()
    }
    assert {document["metadata"]["name"] for document in first.values()} == {
        document["metadata"]["name"] for document in second.values()
    }


def test_reader_of_expressions_sees_every_metric() -> None:
    text = 'sum by (run, le) (rate(a_bucket{x="{y}",z=~"b"}[5m])) / on (q) c unless vector(1) > d offset 5m or up{}'
    assert metric_labels(text) == [("a_bucket", ["x", "z"]), ("c", []), ("d", []), ("up", [])]


def test_pictures_are_small() -> None:
    for name in BOARDS:
        size = (ROOT / f"docs/dashboard-{name}.png").stat().st_size
        assert 10_000 < size < 300_000, name
