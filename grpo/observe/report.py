"""A run folder -> one self-contained HTML page: summary, plots, example completions, configuration."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from grpo.config.text import clean
from grpo.config.yaml import parse
from grpo.errors import CheckpointError
from grpo.observe.figures import figures, series
from grpo.observe.folder import Row, number, read_rows
from grpo.observe.progress import clock
from grpo.run.layout import CONFIG, METRICS, REPORT, SAMPLES

GROUPS_SHOWN = 3
COMPLETIONS_SHOWN = 4


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the folder of a run, finished or not, and returns its path.

    Raises CheckpointError if the folder holds no run or a file of it is damaged.
    """
    if not (run_dir / METRICS).is_file():
        raise CheckpointError(f"a run's folder must hold {METRICS}, but {run_dir} does not; give the run.dir of a run")
    rows = list(read_rows(run_dir / METRICS))
    config_text = _read(run_dir / CONFIG)
    drawn = list(figures(rows)) if any(row["event"] == "step" for row in rows) else []
    # The file's name does not end in .html, so that autoescape must be asked for.
    environment = Environment(loader=PackageLoader("grpo.observe", ""), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["visible"] = visible
    page = environment.get_template("report.html.j2").render(
        summary=summarize_run(rows, _parse(config_text)),
        figures=drawn,
        examples=list(examples(run_dir / SAMPLES)),
        completions_shown=COMPLETIONS_SHOWN,
        config=config_text,
        plotly_js=get_plotlyjs() if drawn else "",
    )
    path = run_dir / REPORT
    try:
        scratch = path.with_suffix(".tmp")
        scratch.unlink(missing_ok=True)
        with scratch.open("x", encoding="utf-8", errors="replace") as file:  # "x" writes through no link
            file.write(page)
        scratch.replace(path)
    except OSError as error:
        raise CheckpointError(f"the report must be written to {path}, but: {error}; free space there") from error
    return path


def visible(text: object) -> str:
    """The text with its line breaks; everything else that cannot be seen is written as an escape."""
    return "\n".join(clean(line) for line in str(text).split("\n"))


def summarize_run(rows: Sequence[Row], config: Mapping[str, object]) -> dict[str, object]:
    """What the head of the page says: names of the template to values, None for what was not measured."""
    start: Row = next((row for row in rows if row["event"] == "start"), {})
    end: Row = next((row for row in rows if row["event"] == "end"), {})
    steps = [row for row in rows if row["event"] == "step"]
    run, model = _section(config, "run"), _section(config, "model")
    tokens = sum(series(steps, "rollout/completion_tokens")[1])
    seconds = sum(series(steps, "step/seconds")[1])
    wall = number(rows[-1], "time") - number(rows[0], "time") if rows else 0.0
    return {
        "name": run.get("name", "run"),
        "outcome": end.get("outcome"),
        "message": end.get("message", ""),
        "steps": len(steps),
        "planned": run.get("steps"),
        "accuracy": _first_and_last(rows, "eval/accuracy"),
        "reward": _first_and_last(rows, "reward/mean"),
        "wall": clock(wall),
        "speed": tokens / seconds if seconds else None,
        "facts": {
            "Model": model.get("path", "unknown"),
            "Started": f"{datetime.fromtimestamp(number(start, 'time'), UTC):%Y-%m-%d %H:%M} UTC"
            if start
            else "unknown",
            "Program": f"grpo {start.get('version', '')}",
            "Command": start.get("command", "unknown"),
        },
    }


def examples(path: Path) -> Iterable[dict[str, object]]:
    """Groups of the first and of the last step, of evaluations (the same prompts, side by side) and of training."""
    for event, title in (("eval", "Held-out prompts"), ("step", "Training prompts")):
        first: list[Row] = []
        last: list[Row] = []
        for row in (row for row in read_rows(path) if row["event"] == event):
            if not first or row["step"] == first[0]["step"]:
                first.append(row)
            if last and row["step"] != last[0]["step"]:
                last = []
            last.append(row)
        if first:
            sides = [first] if first[0]["step"] == last[0]["step"] else [first, last]
            rows = list(zip(*(side[:GROUPS_SHOWN] for side in sides), strict=False))
            paired = all(len({row["prompt_id"] for row in pair}) == 1 for pair in rows)
            yield {"title": title, "rows": rows, "paired": paired}


def _first_and_last(rows: Sequence[Row], key: str) -> tuple[float, float | None] | None:
    """None if never measured; the last is None if measured once."""
    values = series(rows, key)[1]
    return (values[0], values[-1] if len(values) > 1 else None) if values else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _parse(text: str) -> dict[str, object]:
    """The configuration as far as it was written; the report of a run killed at its start has none."""
    try:
        config = parse(text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}
