"""No knob without a reader: every key of the configuration is read as an attribute somewhere outside config.py.

Attributes are matched by name only, so a key that shares its name with something else can escape this test.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from grpo.config import Config

ROOT = Path(__file__).parent.parent / "grpo"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def attributes(source: str) -> set[tuple[str, str]]:
    """(owner, attribute) of every read: `config.train.epochs` gives ("config", "train") and ("train", "epochs")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name, node.attr))
    return found


def unread(knobs: list[str], sources: list[str]) -> list[str]:
    read = {attribute for source in sources for _, attribute in attributes(source)}
    return [knob for knob in knobs if knob.rpartition(".")[2] not in read]


def test_every_knob_is_read() -> None:
    sources = [path.read_text() for path in ROOT.rglob("*.py") if path.name != "config.py"]
    assert unread(list(leaves(Config)), sources) == []


def test_the_knobs_are_all_there() -> None:
    knobs = list(leaves(Config))
    assert {"run.seed", "rewards.weight", "train.betas", "deadlines.sync"} <= set(knobs)
    assert len(knobs) == len(set(knobs))


def test_the_rule_itself() -> None:
    assert unread(
        ["train.epochs", "train.ranks"], ["print(config.train.epochs)", "config.ranks = 1  # written, not read"]
    ) == ["train.ranks"]
