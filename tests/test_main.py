"""The command itself: an interpreter that neither the shell nor the working folder decides about."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTILE = "import os\nos.write(1, b'code of the working folder runs')\nos._exit(9)\n"
FOUND = f"import sys; sys.path.insert(len(sys.path) - 1, {str(ROOT)!r}); "
SCRIPT = FOUND + "from grpo.__main__ import main; sys.argv[0] = 'grpo'; main()"
"""As the console script does: its own folder first on the path, the package among the libraries."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working folder with modules that are named as those of Python and of our libraries."""
    for name in ("statistics", "typing", "json", "typer", "pydantic", "rich", "yaml", "signal", "dataclasses"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(HOSTILE)
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_modules_of_the_working_folder_are_not_ours_by_the_command(hostile: Path) -> None:
    code, text = run(["-P", "-c", SCRIPT, "config", "schema"], hostile)
    assert code == 0 and text.startswith("{")


def test_nor_by_python_m(hostile: Path) -> None:
    (hostile / "grpo").symlink_to(ROOT / "grpo")  # else an installed one is found
    assert run(["-m", "grpo", "config", "schema"], hostile)[0] == 0


@pytest.mark.parametrize("path", [".", "", "{folder}", "/nonexistent:{folder}"])
def test_nor_by_pythonpath(hostile: Path, path: str) -> None:
    for name in ("typing", "signal", "dataclasses", "json"):  # Python itself loads such before any code of ours
        (hostile / f"{name}.py").unlink()
    code, text = run(["-P", "-c", SCRIPT, "config", "schema"], hostile, PYTHONPATH=path.format(folder=hostile))
    assert code == 0 and text.startswith("{")


def test_packages_of_pythonpath_are_found_behind_the_installed_ones(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "only_there.py").touch()
    (modules / "yaml.py").touch()
    program = "from grpo import __main__ as m; m.AGAIN = m.AGAIN.partition('import grpo.cli')[0] + " + repr(
        "import only_there, yaml; print(only_there.__file__, yaml.__file__)"
    )
    code, text = run(["-P", "-c", f"{FOUND}{program}; m.main()"], tmp_path, PYTHONPATH=f"{modules}:.")
    there, installed = text.split()
    assert (code, there) == (0, str(modules / "only_there.py"))
    assert installed == importlib.util.find_spec("yaml").origin


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONHASHSEED": "5"},
    ],
)
def test_modes_that_the_shell_asks_of_python_are_without_effect(tmp_path: Path, environment: dict[str, str]) -> None:
    program = "from grpo import __main__ as m; m.AGAIN = " + repr(
        "import sys; print(sys.flags.optimize, sys.flags.utf8_mode, sys.stdout.encoding, sys.flags.ignore_environment)"
    )
    assert run(
        ["-P", "-c", f"{FOUND}{program}; m.main()"],
        tmp_path,
        **environment,
    ) == (
        0,
        "0 1 utf-8 1\n",
    )


def test_an_interpreter_that_is_as_it_should_be_is_not_started_again(tmp_path: Path) -> None:
    program = "from grpo import __main__ as m; m.AGAIN = 'raise SystemExit(9)'"
    code, text = run(
        [
            "-P",
            "-c",
            f"{FOUND}{program}; sys.argv[1:] = ['--version']; m.main()",
        ],
        tmp_path,
        PYTHONUNBUFFERED="1",
        LC_ALL="C.UTF-8",
    )
    assert (code, text.split()[0]) == (0, "grpo")


def test_a_working_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    code, text = run(["-P", "-c", f"import os; os.rmdir(os.getcwd()); {SCRIPT}", "config", "schema"], tmp_path)
    assert (code, text) == (2, "error: the working folder must be there, but it is gone; cd to another\n")


@pytest.mark.parametrize(
    "screen", [{"COLUMNS": "0"}, {"COLUMNS": "1"}, {"COLUMNS": "x"}, {"TERM": "dumb", "NO_COLOR": "1"}, {"TERM": "?"}]
)
def test_the_screen_decides_nothing(tmp_path: Path, screen: dict[str, str]) -> None:
    run_file = str(ROOT / "examples" / "quickstart.yaml")
    model = f"model.path={ROOT / 'examples' / 'quickstart' / 'model'}"
    for verb in (["--help"], ["plan", run_file, model]):
        code, text = run(["-P", "-c", SCRIPT, *verb], tmp_path, **screen)
        assert (code, "Traceback" in text) == (0, False), text


def test_an_interpreter_that_cannot_be_started_again_has_to_do(tmp_path: Path) -> None:
    program = f"{FOUND}sys.executable = '/dev/null'; sys.argv[1:] = ['--version']; import grpo.__main__ as m; m.main()"
    code, text = run(["-P", "-c", program], tmp_path, PYTHONHASHSEED="1")
    assert (code, text.split()[0]) == (0, "grpo")
