"""docs/dashboard-*.png: each dashboard drawn from a live Prometheus, by its own queries, without Grafana.

`python -m charts.generate.pictures URL` fills in the variables as "All" does, asks for every
panel what Grafana would ask for and draws the answers in the dashboard's own layout. A query without an answer is said
in its panel. It needs Chromium (Debian package chromium).
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from PIL import Image
from plotly.offline import get_plotlyjs

from charts.generate.dashboards import FOLDER
from charts.generate.tools import ROOT

COLUMN, ROW, POINTS = 66, 26, 120  # pixels of a grid column and row; points of a series
COLORS = {"blue": "#3b6fb6", "green": "#3f8f4f", "yellow": "#c79a1b", "red": "#c0392b", "transparent": "#f4f5f5"}
STYLE = """body{margin:8px;background:#f4f5f5;font:12px sans-serif;color:#24292e}h1{font-size:18px;margin:4px 6px}
.p{position:absolute;background:#fff;border:1px solid #d8dade;box-sizing:border-box;overflow:hidden}
.t{font-weight:bold;padding:3px 6px}.r{border:0;background:none;font-size:14px;font-weight:bold;padding:3px}
.e{color:#b5382a;padding:2px 8px}
.s{color:#fff;text-align:center;height:100%;float:left}.v{font-size:24px;padding-top:6px}"""
Series = dict[str, Any]  # as the API answers: metric, values or value


class Source:
    """A Prometheus, and the window that is looked at."""

    def __init__(self, url: str, end: float, minutes: float) -> None:
        self.url, self.end, self.seconds = url.rstrip("/"), end, minutes * 60
        self.step = max(5, round(self.seconds / POINTS))

    def filled(self, expression: str) -> str:
        """The expression with what Grafana puts in place of its variables."""
        return re.sub(r"\$(namespace|run|pod)\b", ".+", expression).replace("$__rate_interval", f"{self.step + 45}s")

    def ask(self, expression: str, instant: bool) -> list[Series]:
        """Series that answer an expression of a panel. Raises HTTPError if Prometheus refuses it."""
        window = (
            {"time": self.end} if instant else {"start": self.end - self.seconds, "end": self.end, "step": self.step}
        )
        kind = "query" if instant else "query_range"
        query = urllib.parse.urlencode({"query": self.filled(expression)} | window)
        with urllib.request.urlopen(f"{self.url}/api/v1/{kind}?{query}") as answer:
            found: list[Series] = json.load(answer)["data"]["result"]
        return found


def label(series: Series, legend: str) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: series["metric"].get(match[1], ""), legend).strip()


def worded(value: float, unit: str, now: float) -> str:
    """A value as Grafana shows it, roughly."""
    if not math.isfinite(value):
        return str(value)
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "dateTimeFromNow":
        return f"{now - value / 1000:.0f} s ago"
    if unit == "s":
        minutes = value / 60
        return f"{value:.3g} s" if value < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"{value:.4g}"


def color_of(value: float, panel: dict[str, Any]) -> str:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return COLORS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]


def draw_stat(panel: dict[str, Any], found: list[tuple[str, Series]], now: float) -> str:
    names, unit = panel["options"]["textMode"] == "name", panel["fieldConfig"]["defaults"]["unit"]
    parts = []
    for legend, series in found:
        value = float(series["value"][1])
        text = legend if names else worded(value, unit, now)
        below = "" if names or len(found) == 1 else legend
        parts.append(f'<div class=s style="background:{color_of(value, panel)};width:{100 / len(found)}%">')
        parts.append(f"<div class=v>{escape(text)}</div>{escape(below)}</div>")
    return "".join(parts)


def _times(series: Series) -> list[str]:
    return [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) for at, _ in series["values"]]


def _gaps(series: Series, step: int) -> tuple[list[str], list[float | None]]:
    """Times and values, with a gap where samples are missing."""
    times, values = _times(series), [float(value) for _, value in series["values"]]
    result_times: list[str] = []
    result: list[float | None] = []
    for number, (at, value) in enumerate(zip(times, values, strict=True)):
        if number and series["values"][number][0] - series["values"][number - 1][0] > 1.5 * step:
            result_times.append(at)
            result.append(None)
        result_times.append(at)
        result.append(value if math.isfinite(value) else None)
    return result_times, result


def draw_lines(panel: dict[str, Any], found: list[tuple[str, Series]], step: int) -> go.Figure:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults.get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    figure = go.Figure()
    for legend, series in found:
        x, y = _gaps(series, step)
        mode = "lines" if len(x) > 1 else "markers"
        figure.add_scatter(x=x, y=y, name=legend, mode=mode, line_width=1.3, stackgroup="one" if stacked else None)
    axis = {"type": "log"} if custom.get("scaleDistribution", {}).get("type") == "log" else {}
    axis |= {"tickformat": ".2~%"} if defaults["unit"] == "percentunit" else {}
    axis |= {"ticksuffix": " s"} if defaults["unit"] == "s" else {}
    low, high = defaults.get("min"), defaults.get("max")
    if not axis.get("type"):
        axis |= {"range": [low, high]} if high is not None else {"rangemode": "tozero"} if low is not None else {}
    return figure.update_yaxes(**axis)


def draw_heat(found: list[tuple[str, Series]]) -> go.Figure:
    """Prometheus' buckets hold all that lie below; a cell is the difference to the bucket before."""
    ordered = sorted(found, key=lambda pair: float(pair[1]["metric"]["le"]))
    rows, before = [], [0.0] * len(ordered[0][1]["values"])
    for _, series in ordered:
        row = [float(value) for _, value in series["values"]]
        rows.append([max(now - last, 0) or None for now, last in zip(row, before, strict=False)])
        before = row
    names = [f"≤ {series['metric']['le']}" for _, series in ordered]
    return go.Figure(go.Heatmap(x=_times(ordered[0][1]), y=names, z=rows, colorscale="Blues", showscale=False))


def draw_states(found: list[tuple[str, Series]]) -> go.Figure:
    figure = go.Figure()
    for legend, series in reversed(found):
        on = [value == "1" or None for _, value in series["values"]]
        figure.add_scatter(
            x=_times(series),
            y=[legend if now else None for now in on],
            mode="lines+markers",
            line_width=12,
            marker_symbol="square",
            marker_size=9,
        )
    return figure.update_yaxes(type="category").update_layout(showlegend=False)


def draw(panel: dict[str, Any], source: Source) -> tuple[str, list[str]]:
    """What is inside of a panel, as HTML, and the queries that had no answer."""
    stat = panel["type"] == "stat"
    found, empty = [], []
    for target in panel["targets"]:
        answers = source.ask(target["expr"], instant=stat)
        found += [(label(series, target["legendFormat"]), series) for series in answers]
        empty += [] if answers else [target["legendFormat"] or target["refId"]]
    if not found:
        return "<div class=e>no data</div>", empty
    if stat:
        return draw_stat(panel, found, source.end), empty
    kinds = {"heatmap": lambda: draw_heat(found), "state-timeline": lambda: draw_states(found)}
    figure = kinds.get(panel["type"], lambda: draw_lines(panel, found, source.step))()
    figure.update_layout(
        width=panel["gridPos"]["w"] * COLUMN - 6,
        height=panel["gridPos"]["h"] * ROW - (44 if empty else 28),
        margin={"l": 6, "r": 8, "t": 4, "b": 4},
        template="plotly_white",
        font_size=10,
        legend={"orientation": "h", "y": -0.12, "yanchor": "top"},
        xaxis_tickformat="%H:%M",
        xaxis_range=[time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(source.end - s)) for s in (source.seconds, 0)],
    )
    figure.update_yaxes(automargin=True)
    note = f"<div class=e>no data: {escape(', '.join(empty))}</div>" if empty else ""
    return note + figure.to_html(full_html=False, include_plotlyjs=False, config={"staticPlot": True}), empty


def picture(board: dict[str, Any], source: Source) -> tuple[bytes, list[str]]:
    """The dashboard as PNG, and the titles of panels with a query that had no answer."""
    parts, blank, height = [], [], 0
    for panel in board["panels"]:
        place = panel["gridPos"]
        box = f"left:{place['x'] * COLUMN + 8}px;top:{place['y'] * ROW + 40}px;"
        box += f"width:{place['w'] * COLUMN - 4}px;height:{place['h'] * ROW - 4}px"
        height = max(height, (place["y"] + place["h"]) * ROW + 48)
        if panel["type"] == "row":
            parts.append(f'<div class="p r" style="{box}">{escape(panel["title"])}</div>')
            continue
        inside, empty = draw(panel, source)
        blank += [f"{panel['title']}: {', '.join(empty)}"] if empty else []
        parts.append(f'<div class=p style="{box}"><div class=t>{escape(panel["title"])}</div>{inside}</div>')
    head = (
        f"<meta charset=utf-8><style>{STYLE}</style><script>{get_plotlyjs()}</script><h1>{escape(board['title'])}</h1>"
    )
    return screenshot(head + "".join(parts), 24 * COLUMN + 16, height), blank


def screenshot(page: str, width: int, height: int) -> bytes:
    """The page as a PNG of few colours."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "Chromium is not installed (Debian package chromium)"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "page.html"), Path(folder, "page.png")
        source.write_text(page)
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--virtual-time-budget=20000", f"--window-size={width},{height}", f"--screenshot={target}"]
        subprocess.run([*command, source.as_uri()], check=True, capture_output=True, timeout=180)
        image = Image.open(target).convert("RGB").quantize(48)
    written = BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the dashboards from a live Prometheus into docs/.")
    parser.add_argument("url")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--end", type=float, default=time.time())
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    wanted = parser.parse_args()
    for path in sorted(FOLDER.glob("*.json")):
        content, blank = picture(json.loads(path.read_text()), Source(wanted.url, wanted.end, wanted.minutes))
        target = wanted.folder / f"dashboard-{path.stem}.png"
        target.write_bytes(content)
        print(f"{target} {len(content) // 1024} KB", *(f"  no data: {text}" for text in blank), sep="\n")


if __name__ == "__main__":
    main()
