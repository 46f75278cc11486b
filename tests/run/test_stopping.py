"""The request to stop, with real signals to this process."""

import os
import signal

import pytest

from grpo.errors import Interrupted
from grpo.run.stopping import StopRequest


def test_a_signal_is_a_flag_until_somebody_looks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(30) as stop:
        stop.check()
        assert not stop.requested and stop.seconds_left == 30
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.seconds_left <= 30
        with pytest.raises(Interrupted, match="^stopped by SIGTERM$"):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_must_be_finished_is_waited_for_as_long_as_a_commit_still_fits() -> None:
    with StopRequest(3000) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.reserve_seconds = 10
        stop.check(finish_first=True)
        stop.reserve_seconds = 2500  # a commit takes longer than what is left by half
        with pytest.raises(Interrupted, match="SIGINT"):
            stop.check(finish_first=True)


def test_inside_of_abortable_it_is_raised_at_once_and_only_there() -> None:
    with StopRequest(30) as stop:
        with pytest.raises(Interrupted, match="SIGTERM"), stop.abortable():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the handler has raised")
        with pytest.raises(Interrupted), stop.abortable():
            raise AssertionError("nothing is begun after a request")


def test_a_closed_terminal_stops_unless_nohup_has_turned_that_off() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest(30) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted, match="^stopped by SIGHUP$"):
                stop.check()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest(30) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
