"""What starts took, by actor and phase (`run/start.py`): a line for the terminal, a table for the report."""

from collections.abc import Mapping, Sequence

from grpo.observe.rows import Row, finite
from grpo.types import Stats

STARTUP = "startup"
"""The event of such a row of metrics.jsonl: {"event": "startup", "actor": "engine 0", "start/imports": 6.1, …}."""
DRIVER = "driver"
"""The name of the process that runs the loop."""
SHOWN = 0.04
"""Share of a start below which a phase is not named in the line."""
MOST_ACTORS = 8


def start_line(actors: Mapping[str, Stats]) -> str:
    """`start 31.2 s: ray 5.0, actors 18.1, …; engine 0 17.9 s: imports 8.1, …`: the driver, each role's slowest."""
    slowest: dict[str, tuple[str, Stats]] = {}
    for name, seconds in actors.items():
        role = name.rstrip("0123456789")
        if role not in slowest or total(seconds) > total(slowest[role][1]):
            slowest[role] = (name, seconds)
    driver = slowest.pop(DRIVER, None)
    parts = ([("start", driver[1])] if driver else []) + list(slowest.values())
    return "; ".join(_sentence(name, seconds) for name, seconds in parts)


def _sentence(name: str, seconds: Stats) -> str:
    whole = total(seconds)
    phases = ", ".join(
        f"{phase.replace('_', ' ')} {took:.1f}"
        for phase, took in sorted(seconds.items(), key=lambda item: -item[1])
        if took >= SHOWN * whole
    )
    return f"{name} {whole:.1f} s: {phases}"


def total(seconds: Stats) -> float:
    """All phases together: without gaps, they are the whole time."""
    return sum(seconds.values())


def start_table(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Actor, seconds and phases, the longest first, of each actor's last start; the driver, then the slowest."""
    last = {str(row.get("actor")): row for row in rows if row["event"] == STARTUP}
    found: list[tuple[str, float, list[tuple[str, float]]]] = []
    for actor, row in last.items():
        named = {key.removeprefix("start/"): finite(value) for key, value in row.items() if key.startswith("start/")}
        phases = [(key.replace("_", " "), value) for key, value in named.items() if value and key != "seconds"]
        phases.sort(key=lambda phase: -phase[1])
        found.append((actor, named.get("seconds") or 0.0, phases))
    found.sort(key=lambda each: (each[0] != DRIVER, -each[1]))
    return [{"actor": actor, "seconds": seconds, "phases": phases} for actor, seconds, phases in found[:MOST_ACTORS]]
