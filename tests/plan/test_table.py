from pathlib import Path
from typing import Any

import pytest

from grpo.plan.memory import GIB, make_plan
from grpo.plan.table import tables
from tests.plan.planned import QWEN_1_5B, config


def printed(folder: Path, gpu_gib: float = 80.0, **sections: Any) -> str:
    from rich.console import Console

    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    planned = config(folder, QWEN_1_5B, **sections)
    for table in tables(make_plan(planned, gpu_gib), planned):
        console.print(table)
    return console.export_text()


def test_the_tables_show_the_sums(tmp_path: Path) -> None:
    text = printed(tmp_path)
    made = make_plan(config(tmp_path, QWEN_1_5B))
    assert "1,543,714,304" in text and "3,087,428,608" in text and f"{made.rank_bytes / GIB:.2f} GiB" in text


def row(text: str, name: str) -> list[str]:
    """The cells behind a row's name."""
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


@pytest.mark.parametrize(
    ("gpu_gib", "sections", "verdict"),
    [
        (80, {}, ["fits", "fits (84%)"]),
        (24, {}, ["fits", "does not fit"]),
        (3, {}, ["does not fit", "does not fit"]),
        (80, {"rollout": {"gpus_per_engine": 0.5}, "train": {"gpus_per_rank": 0.5}}, ["fits", "does not fit"]),
        (
            80,
            {"rollout": {"gpus_per_engine": 0.5, "memory_utilization": 0.3}, "train": {"gpus_per_rank": 0.5}},
            ["fits", "fits (71%)"],
        ),
        (80, {"rollout": {"kv_cache_gib": 0.01}, "cluster": {"device": "cpu"}}, ["does not fit", "-"]),
    ],
)
def test_each_role_has_a_verdict(tmp_path: Path, gpu_gib: float, sections: dict[str, Any], verdict: list[str]) -> None:
    assert row(printed(tmp_path, gpu_gib, **sections), "verdict") == verdict


def test_the_weights_that_are_taken_ahead_have_a_row(tmp_path: Path) -> None:
    name = "next weights"
    assert name not in printed(tmp_path)
    ahead = {"rollout": {"max_staleness": 1}}
    assert row(printed(tmp_path, **ahead), name) == ["2.88 GiB", "-"]
    assert row(printed(tmp_path, 40, **ahead), name) == ["in host memory", "-"]
    on_cpu = printed(tmp_path, **ahead, cluster={"device": "cpu"})
    assert row(on_cpu, name) == ["2.88 GiB", "-"] and row(on_cpu, "sum")[0] != row(printed(tmp_path), "sum")[0]
