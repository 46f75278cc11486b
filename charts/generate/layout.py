"""A dashboard from rows of panels: variables, links, positions and ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model

from charts.generate.panels import RUN, RUNBOOKS, SOURCE

SCHEMA_VERSION = 39
TAG = "grpo"


@dataclass(frozen=True)
class Board:
    """`rows` hold panels by the title of their row; `pods` adds a variable for pods.

    `folded` are rows that are closed at first: what they show is there only with somebody else's exporter.
    """

    name: str
    title: str
    text: str
    rows: Mapping[str, Sequence[Any]]
    pods: bool = False
    folded: Sequence[str] = ()

    def build(self) -> model.Dashboard:
        builder = (
            dashboard.Dashboard(self.title)
            .uid(f"grpo-{self.name}")
            .description(self.text)
            .tags([TAG, "kubernetes", "reinforcement-learning"])
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .time("now-6h", "now")
            .refresh("30s")
            .timezone("browser")
            .variables(self._variables())
            .links(_links())
        )
        for title, panels in self.rows.items():
            builder = builder.with_row(dashboard.Row(title))
            for panel in panels:
                builder = builder.with_panel(panel)
        built = builder.build()
        built.schema_version = SCHEMA_VERSION  # the builder writes an old one; what it builds is valid in this one
        for number, panel in enumerate(built.panels or [], start=1):
            panel.id_val = number
        built.panels = _folded(built.panels or [], self.folded)
        return built

    def _variables(self) -> list[Any]:
        source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        variables: list[Any] = [
            source.current(model.VariableOption(text="default", value="default")),
            _query("namespace", "Namespace", "label_values(grpo_run_info, namespace)"),
            _query("run", "Run", 'label_values(grpo_run_info{namespace=~"$namespace"}, run)'),
        ]
        if self.pods:
            variables.append(_query("pod", "Pod", f"label_values(ray_node_mem_used{{{RUN}}}, pod)"))
        return variables


def _folded(panels: Sequence[Any], titles: Sequence[str]) -> list[Any]:
    """The panels, those of closed rows inside of their row, and the rows below moved up."""
    shown: list[Any] = []
    row, up = None, 0
    for panel in panels:
        place = panel.grid_pos
        if isinstance(panel, model.RowPanel):
            if row is not None:
                up += place.y - up - row.grid_pos.y - 1
            row = panel if panel.title in titles else None
            panel.collapsed = row is not None
        place.y -= up
        (shown if row in (None, panel) else row.panels).append(panel)
    return shown


def _query(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Several values or all; chosen anew with the time range, so that runs that are over can be looked at too."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(model.VariableOption(text="All", value="$__all"))
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def _links() -> list[dashboard.DashboardLink]:
    others = dashboard.DashboardLink("GRPO").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    runbooks = dashboard.DashboardLink("Runbooks").type(model.DashboardLinkType.LINK).url(RUNBOOKS).target_blank(True)
    return [others.include_vars(True).keep_time(True), runbooks.icon("doc")]
