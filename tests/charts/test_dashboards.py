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
    for panel in board["panels"]
    if panel["type"] != "row"
]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


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
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


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
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert board["panels"][0]["title"] == "Now"
    assert all(panel["type"] == "stat" for panel in board["panels"][1:7])


@pytest.mark.parametrize("panel", PANELS)
def test_panel_follows_the_rules(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    assert panel["fieldConfig"]["defaults"]["unit"]
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
def test_panels_do_not_overlap(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[name]["panels"]:
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
        for panel in board["panels"]:
            for target in panel.get("targets", []):
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


def test_dashboards_are_shipped() -> None:
    url = "https://wiki.example.com/runbooks"
    settings = ("monitoring.dashboards.annotations.grafana_folder=GRPO", f"monitoring.runbookUrl={url}")
    maps = {
        key: (document, text)
        for document in kind("ConfigMap", render(*settings))
        for key, text in document["data"].items()
        if key.endswith(".json")
    }
    assert set(maps) == {f"grpo-{name}.json" for name in BOARDS}
    for name, board in BOARDS.items():
        document, text = maps[f"grpo-{name}.json"]
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert document["metadata"]["annotations"] == {"grafana_folder": "GRPO"}
        assert json.loads(text) == json.loads(json.dumps(board).replace("docs/runbooks.md", url))
    assert not [
        m
        for m in kind("ConfigMap", render("monitoring.dashboards.enabled=false"))
        if "dashboard" in m["metadata"]["name"]
    ]


def test_reader_of_expressions_sees_every_metric() -> None:
    text = 'sum by (run, le) (rate(a_bucket{x="{y}",z=~"b"}[5m])) / on (q) c unless vector(1) > d offset 5m or up{}'
    assert metric_labels(text) == [("a_bucket", ["x", "z"]), ("c", []), ("d", []), ("up", [])]


def test_pictures_are_small() -> None:
    for name in BOARDS:
        size = (ROOT / f"docs/dashboard-{name}.png").stat().st_size
        assert 10_000 < size < 300_000, name
