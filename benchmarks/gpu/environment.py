"""The Python that all systems run in: what this one finds, in the same order, and `lengths.py` from the first moment.

Not by PYTHONPATH: grpo lets it decide nothing in the processes of a run.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import lengths

ROOT = Path(__file__).resolve().parents[2]
NAME = "bench_lengths"
FIRST = "import sys; sys.path += {paths!r}\nimport {name}\n"


def make_environment(folder: Path, paths: Sequence[str]) -> Path:
    """An interpreter in a new environment that has these folders for its packages. Its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    shutil.copy(lengths.__file__, site / f"{NAME}.py")
    (site / f"{NAME}.pth").write_text(FIRST.format(paths=list(paths), name=NAME))
    return folder / "bin" / "python"


def own_paths(entries: Sequence[str]) -> list[str]:
    """The repository, then what a `sys.path` has beside Python's own folders."""
    own = {str(Path(entry).resolve()) for entry in (sys.prefix, sys.base_prefix)}
    standard = {str(path) for prefix in own for path in Path(prefix).glob("lib*/python3*")}
    found = [str(ROOT)]
    for entry in entries:
        path = Path(entry or ".").resolve()
        library = path.name in ("lib-dynload",) or str(path) in standard or path.suffix == ".zip"
        if path.is_dir() and not library:
            found.append(str(path))
    return list(dict.fromkeys(found))
