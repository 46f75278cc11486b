"""Fixtures for all tests."""

import os
import signal

import hypothesis
import pytest

from tests import engines
from tests.data_helpers import make_tokenizer
from tests.ranks import stop_server

# No test asserts wall time: machines are noisy. CI draws the same examples each time, so that what it finds is of the
# change; everywhere else they are new ones.
hypothesis.settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("house")

# nohup, which may have started the tests, turns SIGHUP off, a shell's & turns SIGINT off, and a run respects that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_server_left():
    """The fork servers of `ranks.py` and `engines.py` start with the first test that needs them, and serve all."""
    yield
    stop_server()
    engines.SERVER._stop()


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """What a test calls may set variables for its process: an engine's does, and the tests after it are not engines."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
