"""The floors of the house: every module has one, and imports only downwards or inside its own package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "grpo"

FLOORS = {
    "grpo": 0,  # grpo/__init__.py: the version
    "config": 0,
    "configfile": 0,
    "errors": 0,
    "faults": 0,
    "sandbox": 0,
    "stopping": 0,
    "packages": 0,
    "places": 0,
    "types": 0,
    "values": 0,
    "wording": 0,
    "yamlfile": 0,
    "advantages": 1,
    "arithmetic": 1,
    "checkpoint": 1,
    "checks": 1,
    "data": 1,
    "evaluation": 1,
    "export": 1,
    "fatal": 1,
    "figures": 1,
    "health": 1,
    "lease": 1,
    "metrics": 1,
    "placement": 1,
    "plan": 1,
    "plantable": 1,
    "progress": 1,
    "prometheus": 1,
    "recorder": 1,
    "report": 1,
    "rewards": 1,
    "runfolder": 1,
    "serving": 1,
    "shapes": 1,
    "sources": 1,
    "store": 1,
    "tokens": 1,
    "trackers": 1,
    "batching": 2,
    "loss": 2,
    "weights": 2,
    "parts": 3,
    "policy": 3,
    "rollout": 3,
    "trainer": 3,
    "controller": 4,
    "cluster": 5,
    "cli": 6,
    "__main__": 6,
}
# On these floors a module may also import its neighbours.
NEIGHBOURS = {0, 1, 3, 6}
# Who may import these; everyone else meets them through the owner.
OWNERS = {"ray": {"cluster"}, "vllm": {"rollout"}, "deepspeed": {"trainer"}}


def unit(path: Path) -> str:
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
    """What the module or package `name` imports against the rules."""
    if name not in FLOORS:
        return [f"{name} has no floor: put it into FLOORS"]
    found = []
    for target in imports(ast.parse(source)):
        top, _, rest = target.partition(".")
        if top in OWNERS and name not in OWNERS[top]:
            found.append(f"{name} imports {target}: only {', '.join(OWNERS[top])} may")
        if top != "grpo":
            continue
        other = rest.partition(".")[0]
        other = other if other in FLOORS else "grpo"
        higher, lower = FLOORS[name], FLOORS[other]
        if name != other and not (lower < higher or (lower == higher and higher in NEIGHBOURS)):
            found.append(f"{name} (floor {higher}) imports {target} (floor {lower})")
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_every_module_has_a_floor() -> None:
    assert sorted({unit(path) for path in modules()} - set(FLOORS)) == []


def test_every_floor_has_its_module() -> None:
    assert sorted(set(FLOORS) - {unit(path) for path in modules()}) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    assert violations(unit(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("loss", "from grpo.types import Sample", 0),
        ("loss", "from grpo.policy import Policy", 1),
        ("loss", "def f():\n    from grpo import controller", 1),
        ("loss", "from grpo.batching import plan", 1),
        ("rollout", "import vllm.config\nfrom vllm import LLM", 0),
        ("trainer", "import vllm", 1),
        ("data", "import ray.data", 1),
        ("plan", "import grpo.cluster.job", 1),
    ],
)
def test_the_rule_itself(name: str, source: str, count: int) -> None:
    assert len(violations(name, source)) == count
