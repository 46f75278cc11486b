"""What failed in an engine's processes reaches the one that started it."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from grpo.errors import WeightSyncError
from grpo.rollout.notes import LOGGERS, NOTES, Notes, listen
from grpo.run.failures import Kind

CORE = """
import logging
from grpo.rollout.notes import LOGGERS, listen
listen()
listen()
for error in (ConnectionResetError("peer"), MemoryError("no room"), KeyError("later")):
    try:
        raise error
    except Exception:
        logging.getLogger(LOGGERS[0]).exception("EngineCore encountered a fatal error.")
logging.getLogger(LOGGERS[0]).error("without an exception")
"""


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    monkeypatch.setenv(NOTES, "")
    made = Notes()
    yield made
    made.close()
    for name in LOGGERS:
        logging.getLogger(name).handlers.clear()


def test_another_process_says_what_would_come_again(notes: Notes) -> None:
    assert notes.take() is None
    subprocess.run([sys.executable, "-c", CORE], check=True, capture_output=True, env={**os.environ})
    failure = notes.take()
    assert failure and (failure.kind, failure.text) == (Kind.MEMORY, "MemoryError: no room")
    assert failure.traceback.endswith("in <module>\nMemoryError: no room\n")
    assert notes.take() is None, "told once"


def test_an_error_of_ours_comes_back_as_it_was(notes: Notes) -> None:
    listen()
    try:
        raise WeightSyncError("a number must reach all ranks")
    except WeightSyncError:
        logging.getLogger(LOGGERS[1]).exception("WorkerProc hit an exception.")
    failure = notes.take()
    assert failure and (failure.error, failure.text) == ("WeightSyncError", "a number must reach all ranks")


def test_half_a_line_of_a_killed_process_is_nothing(notes: Notes) -> None:
    os.write(notes.descriptor, b'{"kind": "bug", "te')
    assert notes.take() is None


def test_no_notes_are_no_error(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    listen()
    monkeypatch.setenv(NOTES, "/nowhere/notes")
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger(LOGGERS[0]).exception("failed")
    assert notes.take() is None
