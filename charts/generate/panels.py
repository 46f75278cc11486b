"""Small builders on Grafana's own: every panel has a data source variable, a unit, a description and runbook links."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from charts.generate.thirdparty import OWN, THIRD_PARTY

RUNBOOKS = "docs/runbooks.md"  # the chart puts monitoring.runbookUrl in its place
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
# What selects the series of the runs that are looked at, and of their pods
RUN = 'namespace=~"$namespace",run=~"$run"'
POD = f'{RUN},pod=~"$pod"'
WIDTH = 24
Queries = Mapping[str, str]  # legend: expression


def fill(expression: str) -> str:
    """An expression with its selectors: `grpo_step{<run>}`, `ray_node_mem_used{<pod>}`."""
    return " ".join(expression.split()).replace("<run>", RUN).replace("<pod>", POD)


def mean(metric: str, by: str = "run", select: str = "<run>", window: str = "$__rate_interval") -> str:
    """Mean of what a histogram observed within a window."""
    sums, counts = (f"sum by ({by}) (rate({metric}_{part}{{{select}}}[{window}]))" for part in ("sum", "count"))
    return f"{sums} / ({counts} > 0)"


def quantile(share: float, metric: str, by: str = "run", select: str = "<run>") -> str:
    """As fine as the histogram's buckets."""
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{{select}}}[$__rate_interval])))"


def percentiles(metric: str, by: str, select: str) -> dict[str, str]:
    """Median and 99th percentile by a label, with their legends."""
    return {f"p{100 * share:.0f} {{{{{by}}}}}": quantile(share, metric, by, select) for share in (0.5, 0.99)}


def mean_and_p99(metric: str) -> dict[str, str]:
    """Mean and 99th percentile by run, with their legends."""
    return {"mean {{run}}": mean(metric), "p99 {{run}}": quantile(0.99, metric)}


def _targets(queries: Queries, instant: bool, heat: bool) -> list[Any]:
    targets = []
    for number, (legend, expression) in enumerate(queries.items()):
        target = prometheus.Dataquery().expr(fill(expression)).legend_format(legend).ref_id(chr(ord("A") + number))
        target = target.datasource(SOURCE).format(PromQueryFormat.HEATMAP if heat else PromQueryFormat.TIME_SERIES)
        targets.append(target.instant() if instant else target.range())
    return targets


def missing(queries: Queries) -> str:
    """What an empty panel says: which exporter is not scraped, if it shows another's metrics."""
    words = set(re.findall(r"[\w:]+", " ".join(queries.values())))
    others = [foreign for foreign in THIRD_PARTY if foreign.source not in OWN]
    sources = [one.source for one in others if any(word.startswith(one.names) for word in words)]
    return f"not scraped: {', '.join(dict.fromkeys(sources))}" if sources else "no data"


def _common(
    panel: Any, title: str, text: str, size: tuple[int, int], alerts: Sequence[str], queries: Queries, empty: str = ""
) -> Any:
    links = [
        dashboard.DashboardLink(f"Runbook {name}")
        .type(model.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}#{name.lower()}")
        .target_blank(True)
        for name in alerts
    ]
    width, height = size
    panel = panel.title(title).description(text).datasource(SOURCE).span(width).height(height).links(links)
    return panel.no_value(empty or missing(queries))


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in steps])
    )


def limits(warning: float, bad: float) -> list[tuple[float | None, str]]:
    """Green, from `warning` on yellow, from `bad` on red; the other way round if bad is the smaller."""
    if bad < warning:
        return [(None, "red"), (bad, "yellow"), (warning, "green")]
    return [(None, "green"), (warning, "yellow"), (bad, "red")]


def number(
    title: str,
    text: str,
    unit: str,
    queries: Queries,
    *,
    steps: Sequence[tuple[float | None, str]] = ((None, "blue"),),
    names: bool = False,
    decimals: int | None = None,
    alerts: Sequence[str] = (),
    width: int = 3,
    mappings: Sequence[model.ValueMapping] = (),
    empty: str = "",
) -> Any:
    """The newest value, large. `names` shows the legend instead of the value."""
    panel = _common(stat.Panel(), title, text, (width, 4), alerts, queries, empty)
    panel = panel.targets(_targets(queries, True, False)).unit(unit)
    panel = panel.thresholds(_thresholds(steps)).mappings(list(mappings))
    if decimals is not None:
        panel = panel.decimals(decimals)
    mode = common_model.BigValueTextMode
    return (
        panel.color_mode(common_model.BigValueColorMode.BACKGROUND)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .text_mode(mode.NAME if names else mode.AUTO)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def lines(
    title: str,
    text: str,
    unit: str,
    queries: Queries,
    *,
    stack: bool = False,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    width: int = 8,
    height: int = 8,
    alerts: Sequence[str] = (),
    empty: str = "",
) -> Any:
    """Series over time."""
    panel = _common(timeseries.Panel(), title, text, (width, height), alerts, queries, empty)
    panel = panel.targets(_targets(queries, False, False))
    panel = (
        panel.unit(unit).line_width(1).fill_opacity(70 if stack else 8).show_points(common_model.VisibilityMode.AUTO)
    )
    panel = panel.span_nulls(False)
    if stack:
        panel = panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL).group("A"))
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    if log:
        scale = common.ScaleDistributionConfig().type(common_model.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    legend = common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.LIST).show_legend(True)
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    return panel.legend(legend.placement(common_model.LegendPlacement.BOTTOM).calcs([])).tooltip(tooltip)


def heat(
    title: str,
    text: str,
    unit: str,
    expression: str,
    *,
    width: int = 8,
    alerts: Sequence[str] = (),
    empty: str = "",
) -> Any:
    """A histogram over time; the expression gives buckets by `le`."""
    queries = {"{{le}}": expression}
    panel = _common(heatmap.Panel(), title, text, (width, 8), alerts, queries, empty)
    panel = panel.targets(_targets(queries, False, True)).calculate(False)
    color = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    return panel.unit(unit).color(color.exponent(0.5)).y_axis(heatmap.YAxisConfig().unit(unit))


def states(
    title: str, text: str, queries: Queries, *, width: int = 24, height: int = 6, alerts: Sequence[str] = ()
) -> Any:
    """A band for each series, coloured where it is 1."""
    panel = _common(statetimeline.Panel(), title, text, (width, height), alerts, queries)
    panel = panel.targets(_targets(queries, False, False))
    legend = common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.LIST).show_legend(False)
    panel = panel.unit("bool_on_off").thresholds(_thresholds([(None, "transparent"), (1, "blue")]))
    panel = panel.legend(legend.placement(common_model.LegendPlacement.BOTTOM).calcs([]))
    return panel.show_value(common_model.VisibilityMode.NEVER).merge_values(True).row_height(0.8).fill_opacity(90)
