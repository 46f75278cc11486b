"""Pictures of a result.json: python benchmarks/gpu/plots.py RESULT_JSON [FOLDER]. Needs matplotlib and nothing else."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PARTS = (("generation", "sampling", "C0"), ("update", "training", "C1"), ("sync", "visible sync", "C3"))


def draw(result: Json, folder: Path) -> list[Path]:
    """steps.png and .svg, shares.png and .svg; none without records. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not result["records"]:
        return []
    made = []
    for name, figure in (("steps", steps_figure(pyplot, result)), ("shares", shares_figure(pyplot, result))):
        for kind in ("png", "svg"):
            made.append(folder / f"{name}.{kind}")
            figure.savefig(made[-1], dpi=120)
        pyplot.close(figure)
    return made


def lengths_of(records: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(record["tokens"] for record in records))


def steps_figure(pyplot: Any, result: Json) -> Any:
    """Seconds a step of each case with its parts beside, and the limit: a panel for each kind of length."""
    records = result["records"]
    panels = lengths_of(records)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 5 * len(panels), 1.4 + 0.55 * most(records)), squeeze=False
    )
    for axis, tokens in zip(axes[0], panels, strict=True):
        own = [record for record in records if record["tokens"] == tokens]
        for place, record in enumerate(own):
            axis.barh(place, record["seconds"], 0.72, color="0.85")
            axis.plot([record["seconds"], record["p90"]], [place] * 2, color="0.4", lw=1)
            axis.text(
                max(record["seconds"], record["p90"]), place, f" {record['seconds']:.2f} s", va="center", fontsize=8
            )
            known = [(record.get(key), label, color) for key, label, color in PARTS if record.get(key)]
            for row, (seconds, _, color) in enumerate(known):
                axis.barh(place - 0.24 + 0.24 * row, seconds, 0.2, color=color)
        for limit in {record["limits"]["step"] for record in own if record["limits"]}:
            axis.axvline(limit, color="k", lw=1, ls=":")
        axis.set_yticks(range(len(own)), [record["case"] for record in own], fontsize=8)
        axis.invert_yaxis()
        axis.set(title="long tail" if tokens == "tail" else f"{tokens} tokens", xlabel="seconds a step")
        axis.set_xlim(0, 1.25 * max(max(record["seconds"], record["p90"]) for record in own))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for _, _, color in PARTS]
    labels = [label for _, label, _ in PARTS]
    handles += [pyplot.Rectangle((0, 0), 1, 1, color="0.85"), pyplot.Line2D([], [], color="k", lw=1, ls=":")]
    figure.legend(
        handles, [*labels, "whole step", "limit of the GPUs"], loc="lower center", ncols=5, frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def shares_figure(pyplot: Any, result: Json) -> Any:
    """How much of each limit is reached, and how busy both pools are."""
    records = result["records"]
    names = ("of the step's limit", "MFU of the update", "sampling, of its limit", "engines busy", "trainer busy")
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(records)))
    for place, record in enumerate(records):
        idle = record.get("idle") or {}
        busy = [None if idle.get(pool) is None else 1 - idle[pool] for pool in ("engines", "trainer")]
        values = (record["shares"]["step"], record["shares"]["train"], record["shares"]["sample"], *busy)
        for row, value in enumerate(values):
            if value is not None:
                axis.barh(place - 0.32 + 0.16 * row, 100 * value, 0.15, color=f"C{row}")
    labels = [f"{record['case']}, {record['tokens']}" for record in records]
    axis.set_yticks(range(len(records)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="%", xlim=(0, 100))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{row}") for row in range(len(names))]
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def most(records: Sequence[Json]) -> int:
    """Cases in the fullest panel."""
    return max([record["tokens"] for record in records].count(tokens) for tokens in lengths_of(records))


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent), sep="\n")
