"""Completions as models write them, each with the verdict that a person gives, for every reward that is built in."""

import json
from collections import Counter
from pathlib import Path

import pytest

from grpo.rewards.exact import exact
from grpo.rewards.gsm8k import boxed, gsm8k

ROWS = [json.loads(line) for line in (Path(__file__).parent / "corpus" / "verdicts.jsonl").read_text().splitlines()]
REWARDS = {"gsm8k": gsm8k, "boxed": boxed, "exact": exact}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['family']} {ascii(row['completion'])[-40:]}")
@pytest.mark.parametrize("name", REWARDS)
def test_the_verdict_is_that_of_a_person(name: str, row: dict[str, str]) -> None:
    assert REWARDS[name]("", row["completion"], row["answer"]) == row[name]


def test_the_table_has_both_verdicts_of_many_kinds() -> None:
    assert len(ROWS) >= 120
    assert len({row["family"] for row in ROWS}) >= 15
    for name in (*REWARDS, "math"):
        assert min(Counter(row[name] for row in ROWS)[verdict] for verdict in (0, 1)) >= 15
