"""No knob without a reader: every key of the configuration is read as `section.key` outside of the schema.

The owner must be the section itself (`config.train.epochs`), a variable of its name (`train.epochs`; `reward.weight`
for an item of `rewards`), or a variable that was assigned from it (`held_out = config.eval`).
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from grpo.config import Config

ROOT = Path(__file__).parents[2] / "grpo"
SCHEMA = {ROOT / "config" / name for name in ("schema.py", "rewards.py", "algorithm.py")}

FILLS_IN = {"algorithm.preset"}
"""Read while the configuration is made: others hold what it says."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def last_name(node: ast.expr) -> str:
    """`epochs` of `config.train.epochs` and of `epochs`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def reads(source: str) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute that is read, with variables replaced by what was assigned to them."""
    tree = ast.parse(source)
    aliases = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.targets[0], ast.Name | ast.Attribute)
        ):
            aliases[last_name(node.targets[0])] = node.value.attr
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = last_name(node.value)
            found |= {(owner, node.attr), (aliases.get(owner, owner), node.attr)}
    return found


def unread(knobs: list[str], sources: list[str]) -> list[str]:
    read = set().union(*map(reads, sources))
    named = {knob: knob.split(".")[-2:] for knob in knobs}
    return [
        knob for knob, (section, key) in named.items() if not {(section, key), (section.removesuffix("s"), key)} & read
    ]


def test_every_knob_is_read() -> None:
    sources = [path.read_text() for path in ROOT.rglob("*.py") if path not in SCHEMA]
    assert unread([knob for knob in leaves(Config) if knob not in FILLS_IN], sources) == []


def test_the_knobs_are_all_there() -> None:
    knobs = list(leaves(Config))
    assert {"run.seed", "rewards.weight", "train.betas", "deadlines.sync"} <= set(knobs)
    assert len(knobs) == len(set(knobs)) > 60


@pytest.mark.parametrize(
    ("source", "is_read"),
    [
        ("print(self.config.eval.every)", True),
        ("def f(eval):\n    return eval.every", True),
        ("held_out = config.eval\nprint(held_out.every)", True),
        ("print(config.sync.every)", False),
        ("config.eval.every = 3", False),
        ("print('eval.every')", False),
    ],
)
def test_the_rule_itself(source: str, is_read: bool) -> None:
    assert unread(["eval.every"], [source]) == ([] if is_read else ["eval.every"])
