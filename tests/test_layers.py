"""The floors of the house: every room has one, and imports only from the floors below, or inside itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "grpo"

FLOORS = (
    {"errors", "types", "grpo"},  # grpo: the version, in grpo/__init__.py
    {"store"},
    {"config"},
    {"run"},
    {"checkpoint", "rewards", "weights"},
    {"algorithm", "data", "interfaces"},
    {"controller", "observe", "plan", "rollout", "trainer"},
    {"cluster", "kubernetes"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Who may import these; everyone else meets them through the owner.
OWNERS = {"ray": {"cluster"}, "vllm": {"rollout"}, "deepspeed": {"trainer"}}


def room(path: Path) -> str:
    """The module or package directly below grpo/ that a file belongs to."""
    inside = path.relative_to(ROOT).with_suffix("")
    return "grpo" if inside.name == "__init__" and len(inside.parts) == 1 else inside.parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, also those inside functions: `from grpo import plan` is grpo.plan."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the floor; write `from grpo...`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(name: str, source: str) -> list[str]:
    """What the room `name` imports against the rules."""
    if name not in FLOOR:
        return [f"{name} has no floor: put it into FLOORS"]
    found = []
    for target in imports(ast.parse(source)):
        top, _, rest = target.partition(".")
        if top in OWNERS and name not in OWNERS[top]:
            found.append(f"{name} imports {target}: only {', '.join(OWNERS[top])} may")
        if top != "grpo":
            continue
        other = rest.partition(".")[0]
        other = other if other in FLOOR else "grpo"
        if name != other and FLOOR[other] >= FLOOR[name]:
            found.append(f"{name} (floor {FLOOR[name]}) imports {target} (floor {FLOOR[other]})")
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    assert {room(path) for path in modules()} == set(FLOOR)


def test_no_floor_is_a_corridor() -> None:
    assert max(map(len, FLOORS)) <= 5


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    assert violations(room(path), path.read_text()) == []


def test_rooms_say_in_a_sentence_what_they_are() -> None:
    doors = [path for path in modules() if path.name == "__init__.py"]
    unnamed = [str(path) for path in doors if not (ast.get_docstring(ast.parse(path.read_text())) or "").strip()]
    assert unnamed == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("algorithm", "from grpo.types import Sample", 0),
        ("algorithm", "from grpo.trainer.model import Policy", 1),
        ("algorithm", "def f():\n    from grpo import controller", 1),
        ("algorithm", "from grpo.data.prompts import PromptStream", 1),  # sideways
        ("algorithm", "from grpo.algorithm.advantages import spread", 0),
        ("rollout", "import vllm.config\nfrom vllm import LLM", 0),
        ("trainer", "import vllm", 1),
        ("data", "import ray.data", 1),
        ("plan", "import grpo.cluster.job", 1),
        ("attic", "import os", 1),
    ],
)
def test_the_rule_itself(name: str, source: str, count: int) -> None:
    assert len(violations(name, source)) == count
