"""charts/grpo/README.md from README.md.gotmpl and the comments of values.yaml, by helm-docs.

`python -m charts.generate.docs` writes it. helm-docs is a Go program and is run from its pinned module.
"""

import shutil
import subprocess
from pathlib import Path

from charts.generate.schema import CHART

HELM_DOCS = "github.com/norwoodj/helm-docs/cmd/helm-docs@v1.14.2"


def go() -> str | None:
    """The Go compiler, on the PATH or where its own archive puts it."""
    return shutil.which("go") or shutil.which("/usr/local/go/bin/go")


def readme() -> str:
    """The README. Raises subprocess.CalledProcessError where Go is missing or its modules cannot be had."""
    command = [go() or "go", "run", HELM_DOCS, "--dry-run", "--chart-search-root", str(CHART), "--log-level", "warning"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip() + "\n"


def main() -> None:
    Path(CHART, "README.md").write_text(readme())


if __name__ == "__main__":
    main()
