"""`make sbom`: what an image's lock installs, all of it and nothing else, as CycloneDX that its own schema takes."""

import importlib.util
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.docker.test_images import IMAGES, lock

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("sbom", ROOT / "requirements" / "sbom.py")
sbom = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sbom)


@pytest.mark.parametrize("image", IMAGES)
def test_it_holds_what_the_image_installs(image):
    found = json.loads(sbom.sbom(image))
    assert {one["name"]: one["version"] for one in found["components"]} == lock(image)
    assert all(one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}" for one in found["components"])
    assert all(len(digest["value"]) == 64 for one in found["components"] for digest in one["properties"])
    subject = found["metadata"]["component"]
    assert (subject["type"], subject["name"]) == ("container", sbom.IMAGES[image])


def test_the_same_lock_gives_the_same_bytes_which_the_schema_takes():
    text = sbom.sbom("controller")
    assert text == sbom.sbom("controller")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
