"""The cluster of the end-to-end tests: the one in KUBECONFIG, with the images of this checkout on its nodes."""

import os
from collections.abc import Iterator

import pytest

from tests.e2e.kube import Namespace, Prometheus, run


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> None:
    if not os.environ.get("KUBECONFIG"):
        pytest.exit("these tests need a cluster: run `make e2e`, which brings one up, or set KUBECONFIG", returncode=4)
    run(["kubectl", "get", "crd", "rayjobs.ray.io"])


@pytest.fixture(scope="session")
def prometheus() -> Prometheus:
    return Prometheus()


def namespace(name: str, level: str = "restricted") -> Iterator[Namespace]:
    """A new namespace that enforces this Pod Security standard; it is deleted in the end."""
    made = Namespace(name)
    made.delete()
    made.create(level)
    yield made
    if not os.environ.get("E2E_KEEP"):
        made.delete()
