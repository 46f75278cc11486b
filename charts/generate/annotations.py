"""Marks on all panels of every dashboard: when a run was started, saved and repaired, and when its alerts fired.

Plain JSON, as Grafana's typed builder knows neither titles nor `useValueForTime`: with it the value of a series, in
milliseconds, is when something was, however seldom Prometheus looks.
"""

from typing import Any

from charts.generate.panels import RUN, SOURCE

Annotation = dict[str, Any]


def mark(name: str, color: str, expression: str, labels: str, title: str, timed: bool = True) -> Annotation:
    """One kind of mark; `labels` of the series become its tags and may stand in the title."""
    source = {"type": SOURCE.type_val, "uid": SOURCE.uid}
    shown = {"name": name, "iconColor": color, "titleFormat": title, "tagKeys": labels, "useValueForTime": timed}
    target = {"expr": expression, "refId": "Anno"}
    return {"datasource": source, "enable": True, "hide": False, "expr": expression, "target": target} | shown


ANNOTATIONS = [
    mark("Starts", "blue", f"max by (run) (grpo_start_timestamp_seconds{{{RUN}}}) * 1000", "run", "{{run}} started"),
    mark(
        "Recoveries",
        "orange",
        f"max by (run, role) (grpo_recovery_timestamp_seconds{{{RUN}}}) * 1000",
        "run,role",
        "{{role}} of {{run}} replaced",
    ),
    mark(
        "Checkpoints",
        "green",
        f"max by (run) (grpo_checkpoint_last_success_timestamp_seconds{{{RUN}}}) * 1000",
        "run",
        "checkpoint of {{run}}",
    ),
    mark(
        "Alerts",
        "red",
        f'max by (run, alertname, severity) (ALERTS{{{RUN},alertname=~"Grpo.+",alertstate="firing"}})',
        "run,severity",
        "{{alertname}} of {{run}}",
        timed=False,
    ),
]
