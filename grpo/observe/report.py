"""A run folder -> one self-contained HTML page: summary, plots, example completions, configuration."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from grpo.config.text import clean
from grpo.config.yaml import MOST_CHARACTERS, parse
from grpo.errors import CheckpointError
from grpo.observe.figures import figures, series
from grpo.observe.lane_figures import lane_figures, read_spans
from grpo.observe.progress import clock
from grpo.observe.rows import Row, finite, read_rows
from grpo.observe.startup import start_table
from grpo.run.layout import CONFIG, METRICS, REPORT, SAMPLES
from grpo.store.files import read_regular, replace

GROUPS_SHOWN = 3
COMPLETIONS_SHOWN = 4
LAST_SECOND = 253_402_300_800
"""Of the year 9999, behind which Python knows no date."""


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the folder of a run, finished or not, and returns its path.

    Raises CheckpointError if the folder holds no run or a file of it is damaged.
    """
    if not os.path.isfile(run_dir / METRICS):
        raise CheckpointError(f"a run's folder must hold {METRICS}, but {run_dir} does not; give the run.dir of a run")
    rows = list(read_rows(run_dir / METRICS))
    config_text = _read(run_dir / CONFIG)
    spans = read_spans(run_dir)
    drawn = [*figures(rows), *lane_figures(spans)] if any(row["event"] == "step" for row in rows) else []
    # The file's name does not end in .html, so that autoescape must be asked for.
    environment = Environment(loader=PackageLoader("grpo.observe", ""), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["visible"] = visible
    page = environment.get_template("report.html.j2").render(
        summary=summarize_run(rows, _parse(config_text)),
        starts=start_table(rows),
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
        replace(scratch, path)
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
    times = [time for row in rows if (time := finite(row.get("time"))) is not None]
    wall = max(times[-1] - times[0], 0.0) if times else 0.0
    return {
        "name": _text(run.get("name"), "run"),
        "outcome": _text(end.get("outcome"), ""),
        "message": _text(end.get("message"), ""),
        "steps": len(steps),
        "planned": _text(run.get("steps"), ""),
        "accuracy": _first_and_last(rows, "eval/accuracy"),
        "reward": _first_and_last(rows, "reward/mean"),
        "wall": clock(wall),
        "speed": finite(tokens / seconds) if seconds > 0 else None,
        "facts": {
            "Model": _text(model.get("path"), "unknown"),
            "Started": _date(start.get("time")),
            "Program": f"grpo {_text(start.get('version'), '')}",
            "Command": _text(start.get("command"), "unknown"),
        },
    }


def _text(value: object, default: str) -> str:
    """A plain value in words; nothing else is written out, as a few anchors of YAML may mean gigabytes."""
    try:
        return str(value) if isinstance(value, str | int | float) else default
    except ValueError:  # more digits than Python prints
        return default


def _date(value: object) -> str:
    seconds = finite(value)
    if seconds is None or not 0 <= seconds < LAST_SECOND:
        return "unknown"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def examples(path: Path) -> Iterable[dict[str, object]]:
    """Groups of the first and of the last step, of evaluations (the same prompts, side by side) and of training."""
    for event, title in (("eval", "Held-out prompts"), ("step", "Training prompts")):
        first: list[Row] = []
        last: list[Row] = []
        for row in (_checked(row, path) for row in read_rows(path) if row["event"] == event):
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


def _checked(row: Row, path: Path) -> Row:
    """A row of samples.jsonl that can be shown. Raises CheckpointError."""
    lists = [row.get(key) for key in ("completions", "rewards", "finish_reasons")]
    texts, rewards, reasons = (items if isinstance(items, list) else None for items in lists)
    if (
        texts is None
        or rewards is None
        or reasons is None
        or not len(texts) == len(rewards) == len(reasons)
        or not all(isinstance(text, str) for text in texts)
        or not all(finite(reward) is not None for reward in rewards)
        or not isinstance(row.get("prompt_id"), str)
        or not {"question", "answer"} <= set(row)
    ):
        raise CheckpointError(
            f"{path}: a row of step {row['step']} must have a prompt_id, its question and answer, and for each "
            "completion a reward and a finish_reason, but has not; take it out"
        )
    return row


def _read(path: Path) -> str:
    try:
        return read_regular(path, MOST_CHARACTERS * 4).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise CheckpointError(f"{path}: must be the run's configuration, but: {error}; take it away") from error


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _parse(text: str) -> dict[str, object]:
    """The configuration as far as it was written; the report of a run killed at its start has none."""
    try:
        config = parse(text) if len(text) <= MOST_CHARACTERS else {}
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}
