"""Batches that were drawn ahead come back bit for bit, parts of rewards among them, and are compared as before."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.algorithm.advantages import advantages
from grpo.config import Algorithm
from grpo.interfaces import Batch
from grpo.rollout.drawn import dump_drawn, load_drawn
from grpo.types import Group, Prompt, Sample

GDPO = Algorithm(preset="gdpo")
RULE = {"max_staleness": 2}
PROMPT = Prompt("p:3", "q \u2028 \U0001f600", "a", (5, 6), "math")
PARTS = [((1.0, 0.1 + 0.2), (0.5, 0.0)), ((1.0, 0.0), (0.5, 1 / 3)), ((1.0, 1.0), (0.5, -1e-300))]
SAMPLES = tuple(
    Sample(
        PROMPT.id, index, (5, 6), (7, 8, 9), (-0.1, math.nan, -1e-7), ((0, 4), (2, 5)), "length", "t", reward=1 / 3,
        trained=(True, False, True), penalty=-0.1, masked=index == 1, parts=parts,
    )
    for index, parts in enumerate(PARTS)
)  # fmt: skip
GROUP = Group(PROMPT, SAMPLES)


def written(folder: Path, *groups: Group) -> bytes:
    """As a checkpoint has it: a file."""
    batch = Batch(groups, [], {"reward/mean": 1 / 3}, skipped=[GROUP], prompts={"taken": 4})
    (folder / "drawn.jsonl").write_bytes(dump_drawn(RULE, 6, [batch]))
    return (folder / "drawn.jsonl").read_bytes()


def test_a_batch_comes_back_bit_for_bit(tmp_path: Path) -> None:
    plain = Group(PROMPT, tuple(replace(sample, parts=(), trained=None, masked=False) for sample in SAMPLES))
    ahead = load_drawn(written(tmp_path, GROUP, plain))
    (draw,) = ahead.draws
    assert (ahead.rule, draw.step, draw.prompts, draw.stats) == (RULE, 7, {"taken": 4}, {"reward/mean": 1 / 3})
    assert repr(draw.kept) == repr([GROUP, plain]) and repr(draw.skipped) == repr([GROUP])  # NaN is no equal of itself
    assert draw.kept[0].samples[0].parts == PARTS[0] and hash(draw.kept[0].samples[0].parts)


def test_rewards_that_were_drawn_are_compared_one_by_one(tmp_path: Path) -> None:
    before = [sample.advantage for sample in advantages([GROUP], GDPO)]
    (draw,) = load_drawn(written(tmp_path, GROUP)).draws
    after = [sample.advantage for sample in advantages(draw.kept, GDPO)]
    assert after == before and len(set(after)) == 3
    assert not draw.kept[0].zero_variance, "equal sums of other parts"


def test_an_older_file_knows_no_parts(tmp_path: Path) -> None:
    def without(row: Any) -> Any:
        for group in row.get("groups", []) + row.get("skipped", []):
            for sample in group["samples"]:
                del sample["parts"]
        return row

    lines = [without(json.loads(line)) for line in written(tmp_path, GROUP).splitlines()]
    (draw,) = load_drawn(b"\n".join(json.dumps(line).encode() for line in lines)).draws
    assert [sample.parts for sample in draw.kept[0].samples] == [()] * 3
    assert [sample.advantage for sample in advantages(draw.kept, GDPO)] == [0.0] * 3, "their one reward is the sum"


def test_turns_that_a_curriculum_skipped_come_back_and_older_files_have_none() -> None:
    turns = [("p:1", "easy"), ("p:2", "hard"), ("p:1", "easy")]
    batch = Batch([GROUP], [], {}, prompts={"taken": 4, "skipped": 3}, not_drawn=turns)
    (draw,) = load_drawn(dump_drawn(RULE, 6, [batch])).draws
    assert draw.not_drawn == turns and draw.prompts == {"taken": 4, "skipped": 3}
    plain = dump_drawn(RULE, 6, [Batch([GROUP], [], {})])
    assert b"not_drawn" not in plain and load_drawn(plain).draws[0].not_drawn == []
