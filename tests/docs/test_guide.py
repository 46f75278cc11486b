"""The guide for Kubernetes: its values are the chart's, its links lead somewhere, it knows every check of preflight."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from grpo import cluster
from grpo.config import Config

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "kubernetes.md"
TEXT = GUIDE.read_text()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_a_link_leads_somewhere(link: str) -> None:
    file, _, anchor = link.partition("#")
    goal = (GUIDE.parent / file).resolve() if file else GUIDE
    assert goal.exists(), goal
    assert not anchor or anchor in anchors(goal.read_text())


BLOCKS = re.findall(r"^ *```yaml\n(.*?)^ *```", TEXT, flags=re.MULTILINE | re.DOTALL)
VALUES = [block for block in BLOCKS if "apiVersion:" not in block]


def test_there_are_values_to_check() -> None:
    assert len(VALUES) >= 5 and len(BLOCKS) > len(VALUES)


@pytest.mark.parametrize("block", VALUES)
def test_values_in_it_are_the_charts(block: str) -> None:
    schema = json.loads((ROOT / "charts/grpo/values.schema.json").read_text())
    errors = jsonschema.validators.validator_for(schema)(schema).iter_errors(yaml.safe_load(block))
    assert [error.message for error in errors if error.validator != "required"] == []  # parts, no whole values


def test_it_names_every_check_of_preflight(tmp_path: Path) -> None:
    places = {"run": {"dir": str(tmp_path / "run")}, "checkpoint": {"dir": str(tmp_path / "checkpoints")}}
    model = {"model": {"path": "examples/quickstart/model", "max_length": 512}, "data": {"source": "arithmetic"}}
    model["rollout"] = {"max_tokens": 256}
    first_cells = re.findall(r"^\| (.+?) \|", TEXT, flags=re.MULTILINE)
    told = {name for cell in first_cells for name in cell.split(", ")}
    names = {check.name for check in cluster.preflight(Config.model_validate(model | places))}
    assert sorted((names | {"ray", "answers", "GPU memory"}) - told) == []
