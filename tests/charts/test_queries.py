"""Every query of the dashboards on a real Prometheus that has the history of a run: what is there, and what is 0."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from charts.generate import dashboards
from charts.generate.pictures import Source
from charts.generate.thirdparty import THIRD_PARTY
from grpo.observe.metrics import CATALOGUE, PHASES
from grpo.observe.prometheus import PrometheusMetrics
from tests.charts.test_dashboards import BOARDS
from tests.charts.test_podmonitors import answers, prometheus
from tests.observe.test_prometheus import full_step
from tests.rules import metric_labels, promtool
from tests.runs import make_config

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian package) is missing")
END, SECONDS, SCRAPE = 1_900_000_000, 900, 15
# What others' labels say, where a query selects by them
LABELS = {"Source": "gcs", "Component": "ray::VLLMActor.run", "deployment_status": "Running", "State": "ALIVE"}
LABELS |= {"alertname": "GrpoStepStalled", "alertstate": "firing", "severity": "page"}


class Clock:
    now = float(END - SECONDS)

    def __call__(self) -> float:
        return self.now


class History:
    """Scrapes of two runs, as lines that `promtool tsdb create-blocks-from openmetrics` takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self.clock = Clock()
        monkeypatch.setattr("grpo.observe.prometheus.time.time", self.clock)
        self.runs = [PrometheusMetrics(run, "0.1.0", "tiny", "dapo", self.clock) for run in ("busy", "begun")]
        for metrics in self.runs:
            metrics.start(make_config(), attempt=1)

    def wait(self, seconds: float) -> None:
        """Time goes by, and Prometheus looks."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += SCRAPE
            self.scrape()

    def scrape(self) -> None:
        stamp, where = f" {self.clock.now:.3f}", 'namespace="demo",pod="demo-head-x"'
        for metrics in self.runs:
            text = generate_latest(metrics.registry).decode()
            samples = [line for line in text.splitlines() if not line.startswith("#")]
            self.lines += [line.replace("{", f"{{{where},", 1) + stamp for line in samples]
        done = self.clock.now - END + SECONDS
        for foreign in THIRD_PARTY:
            labels = ",".join(f'{label}="{LABELS.get(label, "x")}"' for label in foreign.labels)
            labels = f'{where},run="busy",{labels}'.rstrip(",")
            for name in foreign.names:
                if foreign.kind == "plain":
                    self.lines.append(f"{name}{{{labels}}} {done}{stamp}")
                    continue
                for le, share in (("0.1", 0.5), ("1", 0.9), ("+Inf", 1)):
                    self.lines.append(f'{name}_bucket{{{labels},le="{le}"}} {done * share}{stamp}')
                self.lines += [f"{name}_{part}{{{labels}}} {done}{stamp}" for part in ("sum", "count")]

    def write(self, folder: Path) -> None:
        ordered = sorted(self.lines, key=lambda line: line.split("{")[0])
        (folder / "history").write_text("\n".join([*ordered, "# EOF", ""]))
        command = [promtool(), "tsdb", "create-blocks-from", "openmetrics", folder / "history", folder / "data"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """One run that does all there is, with phases longer than any window, and one that has only been started."""
    folder = tmp_path_factory.mktemp("prometheus")
    with pytest.MonkeyPatch.context() as monkeypatch:
        history = History(monkeypatch)
        busy = history.runs[0]
        history.wait(30)
        for step in (2, 3):
            for phase, seconds in zip(PHASES, (30, 15, 15, 240, 15, 45, 15), strict=True):
                busy.phase_started(phase)
                history.wait(seconds)
                busy.phase_ended(phase, ok=True)
            full_step(busy, step)
            busy.policy_version("trainer", step)
            busy.record({"eval/reward": 0.5, "eval/completion_tokens": 20.0})
            history.wait(15)
        busy.phase_started("rollout")
        history.wait(END - history.clock.now)
        history.write(folder)
    with prometheus(folder, []) as port:
        answers(port, "vector(1)")
        yield Source(f"http://127.0.0.1:{port}", END, SECONDS / 60)


def found(source: Source, panel: dict[str, Any], expression: str) -> list[dict[str, Any]]:
    """Series of a query that have a number."""
    series = source.ask(expression, instant=panel["type"] == "stat")
    pairs = [(one, [one["value"]] if "value" in one else one["values"]) for one in series]
    return [one for one, values in pairs if any(value not in ("NaN", "+Inf", "-Inf") for _, value in values)]


def test_no_query_is_without_an_answer_where_the_data_is(source: Source) -> None:
    empty = [
        f"{name}: {panel['title']}: {target['expr']}"
        for name, board in BOARDS.items()
        for panel in dashboards.panels(board)
        for target in panel["targets"]
        if not found(source, panel, target["expr"])
    ]
    assert empty == []


def test_the_time_of_all_phases_is_all_of_the_time(source: Source) -> None:
    """Phases of four minutes in windows of one: what is not over counts too, and nothing is told twice."""
    (panel,) = [one for one in dashboards.panels(BOARDS["pipeline"]) if one["title"] == "Where the time goes"]
    series = source.ask(panel["targets"][0]["expr"], instant=False)
    total: dict[float, float] = {}
    for one in series:
        for at, value in one["values"]:
            total[at] = total.get(at, 0.0) + float(value)
    assert len(total) > 50
    assert {round(value, 6) for value in total.values()} == {1.0}
    (training,) = [one for one in series if one["metric"]["phase"] == "train"]
    assert max(float(value) for _, value in training["values"]) == pytest.approx(0.5)  # of two runs one trains


def test_a_counter_of_a_run_that_has_just_begun_is_0_and_not_missing(source: Source) -> None:
    counters = {one.name for one in CATALOGUE if one.kind == "counter" and "*" not in one.keys.values()}
    checked = 0
    for panel in (one for board in BOARDS.values() for one in dashboards.panels(board)):
        for expression in (target["expr"] for target in panel["targets"]):
            named = {metric for metric, _ in metric_labels(expression)}
            if named and named <= counters:
                own = expression.replace('run=~"$run"', 'run="begun"')
                series = found(source, panel, own)
                assert series, f"{panel['title']}: {expression}"
                checked += 1
    assert checked > 10


def test_every_mark_has_its_moment(source: Source) -> None:
    for mark in BOARDS["overview"]["annotations"]["list"]:
        series = source.ask(mark["expr"], instant=False)
        assert series, mark["name"]
        if mark["useValueForTime"]:
            moments = {float(value) / 1000 for one in series for _, value in one["values"]}
            assert all(END - SECONDS <= moment <= END for moment in moments), mark["name"]
            assert len(moments) == {"Starts": 1}.get(mark["name"], 2)


def test_windows_are_those_of_the_scrapes(source: Source) -> None:
    """What Grafana fills in is at least four scrapes."""
    texts = [target["expr"] for one in dashboards.panels(BOARDS["overview"]) for target in one["targets"]]
    assert any("$__rate_interval" in text for text in texts)
    assert int(re.findall(r"\[(\d+)s\]", source.filled("rate(x[$__rate_interval])"))[0]) >= 3 * SCRAPE
