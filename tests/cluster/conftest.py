"""One Ray for the tests of a file that do not end it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.cluster.session import Session, session
from grpo.run.stopping import StopRequest
from tests.cluster.actors import Rank, make, make_config


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def shared_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def shared(shared_run_dir: Path, said: list[str]) -> Iterator[Session]:
    with StopRequest(30) as stop, session(make_config(shared_run_dir), stop, said.append) as current:
        yield current


@pytest.fixture
def cluster(shared: Session) -> Session:
    return shared


@pytest.fixture
def rank(cluster: Session) -> Rank:
    return make(cluster)
