"""The two lanes of a run as pictures: what each pool did when, in some of its steps."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import plotly.graph_objects as go

from grpo.config.text import clean
from grpo.errors import CheckpointError
from grpo.observe.figures import COLORS, Drawn, lay_out
from grpo.observe.lanes import BUSY, Span
from grpo.observe.rows import Row, finite, read_rows
from grpo.run.layout import TIMELINE

POOLS = {"rollout": "engines", "trainer": "trainer"}
WORDS = ("sample", "train", "reward", "sync", "switch", "publish", "commit", "eval", "write", "receive")
PALETTE = (*COLORS, "#3fb3c4", "#a0653a", "#5c6bc0")
"""The usual ones, so that each has one colour in all pictures."""
STEPS_SHOWN = 3
MOST_TRACKS = 6
MOST_SPANS = 600


def read_spans(run_dir: Path) -> list[Span]:
    """The rows of timeline.jsonl; none in the folder of an older run. Raises CheckpointError for a damaged one."""
    path = run_dir / TIMELINE
    return [_span(row, path) for row in read_rows(path)]


def _span(row: Row, path: Path) -> Span:
    lane, what, step, track = (row.get(key) for key in ("lane", "what", "step", "track"))
    start, end = finite(row.get("start")), finite(row.get("end"))
    if (
        (lane == "rollout" or lane == "trainer")
        and isinstance(what, str)
        and isinstance(step, int)
        and isinstance(track, int)
        and start is not None
        and end is not None
        and start <= end
        and track >= 0
    ):
        return Span(lane, clean(what)[:20], step, track, start, end)
    raise CheckpointError(
        f"{path}: a row of step {step} must have a lane (rollout, trainer), what it did, a track, and a start that is "
        "not after its end, but has not; take it out"
    )


def lane_figures(spans: Sequence[Span]) -> Iterator[Drawn]:
    """A picture of the first steps, of some in the middle and of the last ones."""
    ends = _ends(spans)
    steps = sorted(ends)
    last = len(steps) - STEPS_SHOWN
    places: Sequence[int] = range(0, len(steps), STEPS_SHOWN)
    if last > 2 * STEPS_SHOWN:
        places = sorted({_together(steps, place) for place in (0, last // 2, last)})
    for place in places:
        shown = steps[place : place + STEPS_SHOWN]
        began = [span.start for span in spans if span.step == shown[0]]
        window = (max(ends[steps[place - 1]], min(began)) if place else min(began), ends[shown[-1]])
        if (figure := lane_figure(spans, window)) is None:
            continue
        title = (
            f"What each pool did, steps {shown[0]} to {shown[-1]}"
            if len(shown) > 1
            else f"What each pool did, step {shown[0]}"
        )
        caption = "Numbers are the steps of batches and versions. Where a lane is empty or pale its devices idle."
        yield {"title": title, "caption": caption, "wide": True, "figure": json.loads(figure.to_json())}


def _together(steps: Sequence[int], place: int) -> int:
    """Where as many steps as are shown follow each other, at that place or before it: some may have been taken out."""
    wanted = STEPS_SHOWN - 1
    return next((near for near in range(place, -1, -1) if steps[near + wanted] == steps[near] + wanted), place)


def _ends(spans: Iterable[Span]) -> dict[int, float]:
    """When the trainer was ready with each step."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.lane == "trainer" and span.what == "train":
            ends[span.step] = max(span.end, ends.get(span.step, span.end))
    for span in spans:
        if span.what in ("sync", "publish") and span.step in ends and span.lane == "trainer":
            ends[span.step] = max(ends[span.step], span.end)
    return ends


def lane_figure(spans: Sequence[Span], window: tuple[float, float]) -> go.Figure | None:
    """Bars over seconds since the window's start, one row for each track; None where there is nothing."""
    start, end = window
    seen = [span for span in spans if span.end > start and span.start < end and span.track < MOST_TRACKS][:MOST_SPANS]
    if not seen:
        return None
    words = [*WORDS, *sorted({span.what for span in seen} - set(WORDS))]
    figure = go.Figure()
    for number, word in enumerate(words):
        bars = [span for span in seen if span.what == word]
        if not bars:
            continue
        edges = [(max(span.start, start) - start, min(span.end, end) - start) for span in bars]
        figure.add_bar(
            orientation="h",
            name=word,
            y=[_row(span) for span in bars],
            base=[left for left, _ in edges],
            x=[right - left for left, right in edges],
            text=[str(span.step) for span in bars],
            customdata=[span.end - span.start for span in bars],
            hovertemplate=word + " %{text}: %{customdata:.3~g} s<extra></extra>",
            textposition="inside",
            insidetextanchor="middle",
            constraintext="inside",
            textangle=0,
            marker={"color": PALETTE[number % len(PALETTE)], "line": {"width": 1, "color": "rgba(128,128,128,0.6)"}},
            opacity=1.0 if word in BUSY["rollout"] | BUSY["trainer"] else 0.55,
        )
    rows = sorted({(list(POOLS).index(span.lane), span.track, _row(span)) for span in seen}, reverse=True)
    lay_out(figure, "", legend=True)
    figure.update_layout(barmode="overlay", bargap=0.15, hovermode="closest")
    figure.update_xaxes(title={"text": "seconds"}, range=[0, end - start], dtick=None, tickformat=".6~g")
    figure.update_yaxes(
        categoryorder="array", categoryarray=[name for *_, name in rows], tickformat=None, type="category"
    )
    return figure


def _row(span: Span) -> str:
    return POOLS[span.lane] + (f" {span.track + 1}" if span.track else "")
