"""result.json as a table in markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.record import Json

COLUMNS = (
    "case",
    "tokens",
    "s a step: median (mean, p90)",
    "completions/s",
    "real tokens/s",
    "update: tokens/s, MFU",
    "sampling: tokens/s, of limit",
    "visible sync, of limit",
    "idle: engines, trainer",
    "GPU in use",
    "peak GiB",
    "step, of limit",
)
PLANNED = (
    "case",
    "tokens",
    "measured",
    "by the configuration",
    "error",
    "by its rates",
    "error",
    "idle, predicted",
)


def render(result: Json) -> str:
    """The whole of it."""
    records = result["records"]
    head = (
        f"{result['gpus']} x {result['gpu']}, {result['shape']}: {result['prompts']} prompts of "
        f"{result['prompt_tokens']:.0f} tokens x {result['samples']} completions; for each length "
        f"{result['warmup']} steps of warm-up and {result['steps']} that count."
    )
    parts = [head]
    if records:
        parts.append(table(COLUMNS, [measured_row(record) for record in records]))
    planned = [record for record in records if any((record.get("plan") or {}).values())]
    if planned:
        parts.append("`grpo plan` against it:")
        parts.append(table(PLANNED, [planned_row(record) for record in planned]))
    if ratios := compared(records):
        parts.append("\n".join(ratios))
    parts += [
        f"**{record['case']}, {record['tokens']}: {record['completion_tokens']:.0f} completion tokens a step, but "
        f"{record['wanted_tokens']:.0f} were to be forced**"
        for record in records
        if abs(record["completion_tokens"] / record["wanted_tokens"] - 1) > 0.005
    ]
    for failure in result["failures"]:
        parts.append(f"**{failure['case']} ({', '.join(failure['tokens'])}): {failure['why']}**")
        if failure.get("log"):
            parts.append(f"```\n{failure['log']}\n```")
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_row(record: Json) -> list[str]:
    """The cells of COLUMNS."""
    shares, limits = record["shares"], record["limits"]
    idle = record.get("idle") or {}
    return [
        record["case"],
        record["tokens"],
        f"**{record['seconds']:.2f}** ({record['mean']:.2f}, {record['p90']:.2f})",
        f"{record['completions_per_second']:.0f}",
        f"{record['tokens_per_second'] / 1e3:.1f}k",
        both(thousands(record["train_tokens_per_second"]), percent(shares["train"])),
        both(thousands(record["sample_tokens_per_second"]), percent(shares["sample"])),
        both("" if record.get("sync") is None else f"{1e3 * record['sync']:.0f} ms", percent(shares["sync"])),
        ", ".join(percent(idle.get(pool)) or "–" for pool in ("engines", "trainer")),
        ", ".join(percent(gpu["busy"]) for gpu in record.get("gpus", [])),
        ", ".join(
            f"{gpu['peak_gib']:.0f} ({percent(gpu['peak_gib'] / gpu['total_gib'])})" for gpu in record.get("gpus", [])
        ),
        both(percent(shares["step"]), f"{limits['step']:.2f} s" if limits else ""),
    ]


def planned_row(record: Json) -> list[str]:
    """The cells of PLANNED."""
    cells = []
    for kind in ("config", "from"):
        told = record["plan"].get(kind)
        cells += [f"{told['seconds']:.2f}", f"{told['error']:+.0%}"] if told else ["", ""]
    told = record["plan"].get("from") or record["plan"]["config"]
    idle = both(percent(told["idle"]["engines"]), percent(told["idle"]["trainer"]))
    return [record["case"], record["tokens"], f"{record['mean']:.2f}", *cells, idle]


def compared(records: Sequence[Json]) -> list[str]:
    """How many times faster our best is than each peer, by length."""
    lines = []
    for tokens in dict.fromkeys(record["tokens"] for record in records):
        own = [record for record in records if record["tokens"] == tokens]
        ours = [record for record in own if not record["case"].startswith("trl")]
        best: Any = min(ours, key=lambda record: record["mean"], default=None)
        for peer in (record for record in own if record["case"].startswith("trl")):
            if best:
                times = peer["mean"] / best["mean"]
                lines.append(f"- {tokens} tokens: {peer['case']} takes **{times:.1f} times** as long as {best['case']}")
    return lines


def percent(value: float | None) -> str:
    """A share; nothing where there is none."""
    return "" if value is None else f"{value:.0%}"


def thousands(value: float | None) -> str:
    return "" if value is None else f"{value / 1e3:.1f}k"


def both(one: str, other: str) -> str:
    """What there is of the two."""
    return ", ".join(part for part in (one, other) if part)
