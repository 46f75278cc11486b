"""The example of a new loss in CONTRIBUTING.md, followed word by word in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = re.compile(
    r"`(?P<file>[\w/.]+)`, (?P<side>above|below) (?P<ticks>`+)(?P<line>.+?)(?P=ticks)[^\n]*:\n\n"
    r"```\w+\n(?P<block>.*?)```",
    re.DOTALL,
)
TESTS = ("tests/algorithm/test_variants.py", "tests/algorithm/test_loss.py", "tests/config/test_algorithm.py")
TIMEOUT = 400.0


def insert(folder: Path, file: str, side: str, line: str, block: str) -> None:
    """The block above or below the one line of the file that begins so."""
    lines = (folder / file).read_text().splitlines(keepends=True)
    places = [place for place, each in enumerate(lines) if each.startswith(line)]
    assert len(places) == 1, f"{file} has {len(places)} lines that begin with {line!r}; correct CONTRIBUTING.md"
    lines.insert(places[0] + (side == "below"), block)
    (folder / file).write_text("".join(lines))


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("grpo", "tests", "charts", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    places = list(PLACES.finditer(TEXT))
    assert len(places) == TEXT.count("\n```") // 2, "every block says where it goes"
    for place in places:
        insert(folder, place["file"], place["side"], place["line"], place["block"])
    return folder


def run(folder: Path, *arguments: str) -> str:
    """A module of Python in the copy, whose packages come first; its output."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_test_of_losses_takes_the_new_one(followed: Path) -> None:
    """Its value and gradient in the shared fixture, what holds for all losses, the tables of the documents."""
    chosen = "(spo or name or table or fills or refused) and not luspo and not vespo"
    out = run(followed, "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", chosen, *TESTS)
    passed = set(re.findall(r"^PASSED \S+::(\S+)", out, flags=re.MULTILINE))
    assert {
        "test_the_shared_fixture[spo]",
        "test_ranks_and_micro_batches_add_up_wherever_the_rows_go[spo]",
        "test_on_policy_each_is_the_policy_gradient[spo]",
        "test_the_gradient_is_the_slope_by_finite_differences[spo]",
        "test_equal_rewards_teach_nothing[spo]",
        "test_what_the_sampler_does_not_know_has_weight_one_and_is_counted[spo]",
        "test_the_configuration_and_the_functions_name_the_same",
        "test_names_and_tables_say_the_same",
        "test_the_documents_table_of_losses_names_each_with_its_aggregation",
        "test_a_loss_fills_in_its_own_keys_and_no_others[spo]",
    } <= passed


def test_a_run_can_choose_it_and_the_chart_knows_it(followed: Path) -> None:
    run(followed, "charts.generate.schema")
    assert '"spo"' in (followed / "charts" / "grpo" / "values.schema.json").read_text()
    (followed / "run.yaml").write_text("{model: {path: ./model}, data: {source: arithmetic}, algorithm: {loss: spo}}")
    algorithm = yaml.safe_load(run(followed, "grpo", "config", "show", "run.yaml"))["algorithm"]
    chosen = [algorithm[key] for key in ("loss", "clip_low", "clip_high", "aggregation")]
    assert chosen == ["spo", 0.2, 0.2, "token_mean"]


def test_its_code_is_as_the_house_wants_it(followed: Path) -> None:
    files = [place["file"] for place in PLACES.finditer(TEXT) if place["file"].endswith(".py")]
    run(followed, "ruff", "check", *files)
    run(followed, "ruff", "format", "--check", *files)
