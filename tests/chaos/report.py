"""The table of the sweep: figures by role and by phase, against their targets, for people and as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.judge import Hit, Verdict, most_lost
from tests.chaos.plan import EVERY

COLUMNS = ("kills", "finished alone", "lost steps, max", "wrong prompts", "bit-equal", "noticed, s", "serving, s")


def figures(hits: Sequence[Hit]) -> dict[str, Any]:
    """Of some kills. Seconds are p50, p95 and the longest."""
    return {
        "kills": len(hits),
        "finished": sum(hit.finished for hit in hits),
        "lost_steps": max((hit.lost_steps for hit in hits), default=0),
        "wrong_prompts": sum({hit.run: hit.wrong_prompts for hit in hits}.values()),
        "equal": sum(hit.equal for hit in hits),
        "noticed": spread([hit.noticed for hit in hits if hit.noticed is not None]),
        "serving": spread([hit.serving for hit in hits if hit.serving is not None]),
    }


def spread(seconds: Sequence[float]) -> tuple[float, float, float] | None:
    if not seconds:
        return None
    cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 19
    return cuts[9], cuts[18], max(seconds)


def missed_targets(verdicts: Sequence[Verdict]) -> list[str]:
    """What is not as promised: 100 % finished without a human and equal, no prompt wrong, few steps lost, no traces."""
    missed = [f"{verdict.run}: {problem}" for verdict in verdicts for problem in verdict.problems]
    wrong = {hit.run: hit.wrong_prompts for verdict in verdicts for hit in verdict.hits if hit.wrong_prompts}
    missed += [f"{run}: {steps} steps with doubled or skipped prompts" for run, steps in wrong.items()]
    for hit in (hit for verdict in verdicts for hit in verdict.hits):
        if hit.lost_steps > most_lost(hit.kill, EVERY):
            missed.append(f"{hit.run}: {hit.kill.spec} cost {hit.lost_steps} finished steps")
    return missed


def show(title: str, verdicts: Sequence[Verdict], file: Path) -> None:
    """Prints the figures by role and by phase, and writes them with every kill to `file`."""
    hits = [hit for verdict in verdicts for hit in verdict.hits]
    keys: dict[str, Callable[[Hit], str]] = {
        "role": lambda hit: hit.kill.role if hit.kill.action == "kill" else f"{hit.kill.role}, frozen",
        "phase": lambda hit: hit.kill.phase if hit.kill.action == "kill" else "frozen",
    }
    written: dict[str, Any] = {"title": title, "missed": missed_targets(verdicts), "all": figures(hits)}
    for name, key in keys.items():
        groups = {value: [hit for hit in hits if key(hit) == value] for value in sorted(set(map(key, hits)))}
        written[f"by {name}"] = {value: figures(group) for value, group in groups.items()}
        table = Table(name, *COLUMNS, title=f"{title}, by {name} (seconds: p50 / p95 / longest)", title_justify="left")
        for value, group in groups.items():
            table.add_row(value, *cells(figures(group)))
        table.add_section()
        table.add_row("all", *cells(figures(hits)))
        Console(width=140).print(table)
    if slowed := [verdict for verdict in verdicts if verdict.slept]:
        good = sum(not verdict.problems for verdict in slowed)
        seconds = [verdict.slept for verdict in slowed]
        written["slowed"] = {"runs": len(slowed), "as undisturbed": good, "seconds": seconds}
        more = f"{min(seconds):.0f} to {max(seconds):.0f} s more"
        print(f"slowed: {good} of {len(slowed)} runs as undisturbed; their calls took {more}")
    written["hits"] = [asdict(hit) | {"spec": hit.kill.spec} for hit in hits]
    written["runs"] = [asdict(verdict) | {"hits": len(verdict.hits)} for verdict in verdicts]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written, indent=1))


def cells(found: dict[str, Any]) -> list[str]:
    def share(key: str) -> str:
        return f"{found[key]}/{found['kills']}"

    def seconds(key: str) -> str:
        return " / ".join(f"{value:.1f}" for value in found[key]) if found[key] else "-"

    counts = [str(found["kills"]), share("finished"), str(found["lost_steps"]), str(found["wrong_prompts"])]
    return [*counts, share("equal"), seconds("noticed"), seconds("serving")]
