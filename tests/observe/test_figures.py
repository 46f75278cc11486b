import pytest

from grpo.observe.figures import MOST_BARS, PLOTS, figures, phase_figure, series
from grpo.observe.metrics import lookup
from grpo.observe.rows import read_rows
from tests.observe.test_report import ALL_PLOTS
from tests.runs import write_run


def titles(rows):
    return [figure["title"] for figure in figures(rows)]


def test_every_key_of_a_plot_is_in_the_catalogue():
    for plot in PLOTS:
        for key in [*plot.keys, *([plot.band] if plot.band else [])]:
            lookup(key.replace("*", "4"))


def test_plots_without_values_are_left_out(tmp_path):
    rows = list(read_rows(write_run(tmp_path / "run", steps=2) / "metrics.jsonl"))
    assert titles(rows) == [title for title in ALL_PLOTS if title not in ("Held-out accuracy", "What each pool did")]
    assert titles([{"event": "step", "step": 1, "train/loss": None}]) == []


def test_series_leaves_out_nulls():
    rows = [{"step": 1, "a": 0.5}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 1}]
    assert series(rows, "a") == ([1, 4], [0.5, 1.0])


def test_the_reward_has_a_band_of_one_standard_deviation():
    rows = [{"step": step, "reward/mean": 0.5, "reward/std": 0.25} for step in (1, 2)]
    upper, lower, mean = next(figures(rows))["figure"]["data"]
    assert (upper["y"], lower["y"], mean["y"]) == ([0.75, 0.75], [0.25, 0.25], [0.5, 0.5])


def test_pass_at_k_is_named_in_the_order_of_k():
    rows = [{"step": 0, "eval/accuracy": 0.1, "eval/pass@16": 0.4, "eval/pass@2": 0.2, "eval/maj@16": 0.3}]
    (figure,) = (figure for figure in figures(rows) if figure["title"] == "Held-out accuracy")
    assert [line["name"] for line in figure["figure"]["data"]] == ["accuracy", "pass@2", "pass@16", "maj@16"]


def test_phases_outside_of_a_step_count_to_it():
    rows = [
        {"step": 1, "phase/train": 2.0},
        {"step": 1, "phase/eval": 3.0},
        {"step": 2, "phase/train": 1.0, "phase/eval": None},
    ]
    (figure,) = phase_figure(rows)
    bars = {bar["name"]: list(zip(bar["x"], bar["y"], strict=True)) for bar in figure["figure"]["data"]}
    assert bars == {"train": [(1, 2.0), (2, 1.0)], "eval": [(1, 3.0)]}


def test_a_long_run_has_few_bars_and_loses_no_second():
    rows = [{"step": step, "phase/train": 2.0} for step in range(1, 1000)]
    (figure,) = phase_figure(rows)
    (bar,) = figure["figure"]["data"]
    assert len(bar["x"]) <= MOST_BARS
    assert bar["y"][1] == pytest.approx(2.0)
    assert sum(bar["y"]) * 7 == pytest.approx(2.0 * 999)
    assert "mean of 7 steps" in figure["caption"]
