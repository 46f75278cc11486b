"""The plots of a run: rows of metrics.jsonl -> Plotly figures as JSON."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypedDict

import plotly.graph_objects as go

from grpo.observe.metrics import PHASES
from grpo.observe.rows import Row, finite, number

# Readable on a light and on a dark page.
COLORS = ("#3b82d6", "#e0803a", "#23a07a", "#8b6fe0", "#d3568f", "#b59a1d", "#7f8794")
MOST_BARS = 150
MOST_MARKERS = 60


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of lines. `keys` maps keys of metrics.jsonl (or patterns with `*`) to names, `band` is half a width."""

    title: str
    caption: str
    keys: dict[str, str]
    unit: str = ""
    band: str | None = None
    share: bool = False


PLOTS = (
    Plot(
        "Reward",
        "Mean over the samples of a step; the band is one standard deviation. Rising means that the policy learns.",
        {"reward/mean": "reward"},
        band="reward/std",
    ),
    Plot(
        "Held-out accuracy",
        "On prompts never trained on: one sample (accuracy), the best of k (pass@k), the majority of k (maj@k).",
        {"eval/accuracy": "accuracy", "eval/pass@*": "pass@*", "eval/maj@*": "maj@*"},
        share=True,
    ),
    Plot(
        "KL divergence",
        "How far the policy moves within a step, and from the reference if there is one. Spikes: too large steps.",
        {"train/approx_kl": "update", "train/kl_reference": "reference"},
        "nats per token",
    ),
    Plot(
        "Sampler against trainer",
        "Difference of what vLLM and DeepSpeed compute for the same tokens. It should stay near 0.",
        {"train/rollout_kl": "KL", "train/rollout_abs_diff": "mean |difference|"},
        "nats per token",
    ),
    Plot("Entropy", "How undecided the policy is. Near 0 it no longer explores.", {"train/entropy": "entropy"}, "nats"),
    Plot("Completion length", "Mean over the samples of a step.", {"completion/tokens": "length"}, "tokens"),
    Plot(
        "Lost samples",
        "Completions cut by max_tokens, and groups of equal rewards, which teach nothing.",
        {"completion/truncated": "truncated", "reward/zero_variance": "no signal"},
        share=True,
    ),
    Plot(
        "Prompts that teach",
        "Sampled groups with an advantage; turns of prompts that data.curriculum skipped, as they are easy or hard.",
        {
            "rollout/effective_groups": "with an advantage",
            "curriculum/skipped_easy": "skipped: easy",
            "curriculum/skipped_hard": "skipped: hard",
        },
        share=True,
    ),
    Plot(
        "Clipped tokens",
        "Tokens whose ratio left the trust region at its lower or upper bound.",
        {"train/clip_low": "low", "train/clip_high": "high"},
        share=True,
    ),
    Plot(
        "Loss",
        "Mean of the step's updates. That of GRPO hovers around 0 and need not fall; that of a warm-up (grpo sft) "
        "falls, on held-out rows too.",
        {"train/loss": "loss", "eval/loss": "held out"},
    ),
    Plot("Gradient norm", "Before clipping.", {"train/grad_norm": "norm"}),
    Plot("Learning rate", "Of the step's last update.", {"train/learning_rate": "rate"}),
    Plot(
        "Idle pools",
        "Share of a step's time in which the engines or the trainer had nothing to do; without overlap each waits for "
        "the other.",
        {"pipeline/rollout_idle": "engines", "pipeline/trainer_idle": "trainer"},
        share=True,
    ),
    Plot(
        "Lag",
        "Versions that the weights which drew the samples were behind those that were trained.",
        {"rollout/staleness": "mean", "rollout/staleness_max": "largest"},
        "versions",
    ),
    Plot("Throughput", "Completion tokens by time of the step.", {"step/tokens_per_second": "speed"}, "tokens/s"),
)


class Drawn(TypedDict):
    """What the page is given of a plot; `wide` takes its whole width, `figure` is Plotly's JSON."""

    title: str
    caption: str
    wide: bool
    figure: object


def figures(rows: Sequence[Row]) -> Iterator[Drawn]:
    """Title, caption and Plotly figure of every plot that has something to draw."""
    for plot in PLOTS:
        figure = line_figure(plot, rows)
        if figure is not None:
            yield {"title": plot.title, "caption": plot.caption, "wide": False, "figure": json.loads(figure.to_json())}
    yield from phase_figure(rows)


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where it has a value."""
    points = [(int(number(row, "step")), value) for row in rows if (value := finite(row.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def line_figure(plot: Plot, rows: Sequence[Row]) -> go.Figure | None:
    """The lines of a plot, None if there is nothing to draw."""
    present = {key for row in rows for key in row}
    names = {
        key: name.replace("*", key[pattern.find("*") :])
        for pattern, name in plot.keys.items()
        for key in sorted(present, key=lambda key: (len(key), key))
        if fnmatchcase(key, pattern)
    }
    figure = go.Figure()
    for color, (key, name) in zip(COLORS, names.items(), strict=False):
        steps, values = series(rows, key)
        if not steps:
            continue
        if plot.band is not None:
            _add_band(figure, steps, values, series(rows, plot.band)[1], color)
        mode = "lines+markers" if len(steps) <= MOST_MARKERS else "lines"
        marker = {"size": 5 if len(steps) > 1 else 10}
        figure.add_scatter(x=steps, y=values, name=name, mode=mode, line={"color": color, "width": 2}, marker=marker)
    if not figure.data:
        return None
    lay_out(figure, plot.unit, legend=len(names) > 1)
    if plot.share:
        highest = max(max(trace.y) for trace in figure.data)
        figure.update_yaxes(tickformat=".0%" if highest > 0.05 else ".1%")
    return figure


def phase_figure(rows: Sequence[Row]) -> Iterator[Drawn]:
    """Seconds of each phase stacked by step, in at most MOST_BARS bars; nothing without phases."""
    seconds: dict[str, dict[int, float]] = {phase: defaultdict(float) for phase in PHASES}
    for phase in PHASES:
        for step, value in zip(*series(rows, f"phase/{phase}"), strict=True):
            seconds[phase][step] += value
    last = max((step for by_step in seconds.values() for step in by_step), default=None)
    if last is None:
        return
    width = math.ceil((last + 1) / MOST_BARS)
    figure = go.Figure()
    for color, (phase, by_step) in zip(COLORS, seconds.items(), strict=True):
        bars: dict[int, float] = defaultdict(float)
        for step, value in by_step.items():
            bars[step // width * width] += value / width
        if bars:
            figure.add_bar(x=list(bars), y=list(bars.values()), name=phase.replace("_", " "), marker={"color": color})
    lay_out(figure, "seconds", legend=True)
    figure.update_layout(barmode="stack", bargap=0.1 if last > 10 else 0.6)
    caption = "What a step's time goes into; evaluations and saves count to the step before them."
    if any("pipeline/batches_ahead" in row for row in rows):
        caption += " Batches are drawn ahead: rollout is the time in which the trainer waited for one."
    if width > 1:
        caption += f" A bar is the mean of {width} steps."
    yield {"title": "Time by phase", "caption": caption, "wide": True, "figure": json.loads(figure.to_json())}


def _add_band(figure: go.Figure, steps: list[int], values: list[float], widths: list[float], color: str) -> None:
    if len(widths) != len(values):
        return
    upper = [value + width for value, width in zip(values, widths, strict=True)]
    lower = [value - width for value, width in zip(values, widths, strict=True)]
    edge = {"width": 0, "color": color}
    figure.add_scatter(x=steps, y=upper, mode="lines", line=edge, hoverinfo="skip", showlegend=False)
    fill = {"fill": "tonexty", "fillcolor": f"rgba{(*bytes.fromhex(color[1:]), 0.16)}"}
    figure.add_scatter(x=steps, y=lower, mode="lines", line=edge, hoverinfo="skip", showlegend=False, **fill)


def lay_out(figure: go.Figure, unit: str, legend: bool) -> None:
    """Colours of text, grid and background come from the page, so that they follow its light or dark scheme."""
    figure.update_layout(
        template="none",
        autosize=True,
        margin={"l": 56, "r": 16, "t": 28 if legend else 12, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="x unified",
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.update_xaxes(title={"text": "step", "standoff": 6}, zeroline=False, showgrid=False, tickformat="d")
    if max(max(trace.x) for trace in figure.data) <= 10:
        figure.update_xaxes(dtick=1)  # else Plotly puts ticks between the steps
    title = {"text": unit, "standoff": 6}
    figure.update_yaxes(title=title, zeroline=False, automargin=True, rangemode="tozero", tickformat=".6~g")
