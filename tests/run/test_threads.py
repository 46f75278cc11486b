import os
import sys
import threading

import pytest

from grpo.run import threads
from grpo.run.threads import POLITE, give_way, start_lasting


def run(work, ended=None):
    thread = start_lasting("heart", work, ended or threading.Event())
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(threads, "PAUSE_SECONDS", 0.001)


def test_work_that_returns_is_done(capsys):
    done = []
    run(lambda: done.append(1))
    assert (done, capsys.readouterr().err) == ([1], "")


def test_whatever_is_raised_is_said_once_and_the_work_goes_on(capsys):
    errors = [OSError(24, "Too many open files")] * 3 + [MemoryError(), SystemExit(1), RuntimeError("two\nlines"), None]

    def work():
        if error := errors.pop(0):
            raise error

    run(work)
    assert capsys.readouterr().err.splitlines() == [
        "warning: the thread heart goes on after OSError: [Errno 24] Too many open files",
        "warning: the thread heart goes on after MemoryError: ",
        "warning: the thread heart goes on after SystemExit: 1",
        "warning: the thread heart goes on after RuntimeError: two lines",
    ]


def test_a_closed_screen_is_survived(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    left = [1, 2, 3]

    def work():
        if left:
            left.pop()
            raise ValueError(len(left))

    run(work)
    assert not left


def test_it_ends_when_told_also_while_the_work_fails():
    ended = threading.Event()

    def work():
        ended.set()
        raise ValueError

    run(work, ended)


def test_a_thread_that_gives_way_is_polite_and_its_children_too_but_nobody_else() -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found: list[int] = []

    def look() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def polite() -> None:
        for _ in range(2):  # a thread that writes every commit of a run
            give_way()
            look()
        child = threading.Thread(target=look)
        child.start()
        child.join()

    thread = threading.Thread(target=polite)
    thread.start()
    thread.join()
    look()
    assert found == [min(19, usual + POLITE)] * 3 + [usual]
