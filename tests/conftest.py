"""Fixtures for all tests."""

import hypothesis
import pytest

from tests.data_helpers import make_tokenizer

hypothesis.settings.register_profile("house", deadline=None)  # no test asserts wall time: machines are noisy
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
