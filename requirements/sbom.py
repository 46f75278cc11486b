"""What is in each image, as a CycloneDX SBOM from the lock that the image is installed from.

`make sbom` writes dist/{controller,worker-cpu,worker-gpu}.cdx.json. The same lock gives the same bytes. The base
image's own packages are not in it; a builder that scans (`PUSH=1` with docker) adds those.
"""

import re
import sys
import tomllib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
IMAGES = {"controller": "grpo-controller", "worker-cpu": "grpo-worker", "worker-gpu": "grpo-worker"}
# What an image is: markers of a lock are for other systems too
WHERE = {"python_version": "3.11", "python_full_version": "3.11.14", "platform_machine": "x86_64"}
WHERE |= {"sys_platform": "linux", "platform_system": "Linux", "platform_python_implementation": "CPython"}
WHERE |= {"implementation_name": "cpython", "os_name": "posix"}


def packages(lock: str) -> Iterator[Component]:
    """What a lock installs in the image, each with the digests that it may have."""
    for entry in re.split(r"^(?=[a-zA-Z0-9])", lock, flags=re.M)[1:]:
        wanted = Requirement(entry.partition("\n")[0].rstrip(" \\"))
        if wanted.marker is not None and not wanted.marker.evaluate(WHERE):
            continue
        version = str(wanted.specifier).removeprefix("==")
        url = PackageURL("pypi", name=wanted.name, version=version)
        digests = [Property(name="grpo:lock:sha256", value=digest) for digest in re.findall(r"sha256:(\w{64})", entry)]
        ref, library = str(url), ComponentType.LIBRARY
        yield Component(name=wanted.name, version=version, type=library, purl=url, bom_ref=ref, properties=digests)


def sbom(image: str) -> str:
    """The SBOM of an image, by the name of its lock."""
    lock = (ROOT / f"requirements/{image}.lock").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    subject = Component(name=IMAGES[image], version=version, type=ComponentType.CONTAINER, bom_ref=image)
    bom = Bom(components=packages(lock), serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"{image} {version}\n{lock}"))
    bom.metadata.component = subject
    bom.metadata.timestamp = datetime(1980, 1, 1, tzinfo=UTC)  # the lock's content says which one it is
    bom.register_dependency(subject, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def main() -> None:
    folder = ROOT / "dist"
    folder.mkdir(exist_ok=True)
    for image in sys.argv[1:] or IMAGES:
        (folder / f"{image}.cdx.json").write_text(sbom(image))
        print(folder / f"{image}.cdx.json")


if __name__ == "__main__":
    main()
