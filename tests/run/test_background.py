"""Threads that work ahead end when they are told to."""

import threading

import pytest

from grpo.run.background import Background, Cancelled


def test_a_thread_ends_at_its_next_look_and_nobody_else_is_told() -> None:
    background, begun = Background(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        try:
            while True:
                background.check()
        except Cancelled:
            ended.append("work")
            raise

    background.start("worker", work)
    assert begun.wait(10) and not background.mine
    background.cancel()
    background.check()  # the main thread goes on
    assert background.join(10) and ended == ["work"]


def test_new_threads_start_once_all_have_ended() -> None:
    background, may_end = Background(), threading.Event()
    background.start("slow", may_end.wait)
    background.cancel()
    assert not background.join(0.01)
    may_end.set()
    assert background.join(10)
    done = threading.Event()
    background.start("next", lambda: (background.check(), done.set()))
    assert done.wait(10)


def test_what_is_not_a_cancellation_is_the_own_affair_of_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda info: seen.append(str(info.exc_value)))
    background = Background()
    background.start("broken", lambda: [][0])
    assert background.join(10) and seen == ["list index out of range"]


def test_a_thread_that_one_of_them_starts_as_it_ends_is_waited_for_too() -> None:
    background, may_end = Background(), threading.Event()

    def first() -> None:
        may_end.wait()
        background.start("second", lambda: threading.Event().wait(0.05))

    background.start("first", first)
    background.cancel()
    threading.Timer(0.02, may_end.set).start()
    assert background.join(10)


def test_a_thread_that_is_just_starting_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    background, starting, may_start = Background(), threading.Event(), threading.Event()
    start = threading.Thread.start

    def slowly(thread: threading.Thread) -> None:
        if thread.name == "slow":
            starting.set()
            may_start.wait(10)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    starter = threading.Thread(target=background.start, args=("slow", lambda: None), name="starter")
    starter.start()
    assert starting.wait(10)
    threading.Timer(0.05, may_start.set).start()
    assert background.join(10)
    starter.join(10)
