"""What a start is at: phases without gaps, whose seconds are the whole time."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.run import start
from grpo.run.start import Phases, process_began, with_place


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("grpo.run.start.time.monotonic", lambda: self.now)


def test_each_phase_lasts_until_the_next_and_one_that_comes_again_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    phases = Phases("process", began=97.5)
    for seconds, phase in ((0.5, "imports"), (4.0, "weights"), (1.0, "proof"), (2.0, "weights")):
        clock.now += seconds
        phases.begin(phase)
    clock.now += 0.25
    found = phases.end()
    assert found == {"process": 3.0, "imports": 4.0, "weights": 1.25, "proof": 2.0}
    assert sum(found.values()) == clock.now - 97.5


def test_what_another_process_has_measured_is_a_part_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    phases = Phases("core")
    clock.now += 10
    phases.begin("tokenizer")
    phases.split("core", {"weights": 3.0, "graphs": 4.0})
    assert phases.end() == {"core": 3.0, "weights": 3.0, "graphs": 4.0, "tokenizer": 0.0}


@given(parts=st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e4)), whole=st.floats(0, 1e4))
def test_parts_never_make_it_longer(parts: dict[str, float], whole: float) -> None:
    phases = Phases("core", time.monotonic() - whole)
    phases.begin("rest")
    before = phases._seconds["core"]
    phases.split("core", parts)
    assert sum(phases._seconds.values()) == pytest.approx(before)
    assert min(phases._seconds.values()) >= 0


@given(process=st.floats(0, 1e4), imports=st.floats(0, 1e4), took=st.floats(0, 3e4))
def test_an_actors_phases_are_all_that_the_driver_has_waited(process: float, imports: float, took: float) -> None:
    found = with_place({"process": process, "imports": imports}, took)
    assert found["imports"] == imports and min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(max(took, imports), abs=1e-9)


def test_a_process_that_was_ready_before_it_was_asked_for() -> None:
    assert with_place({"process": 60.0, "imports": 5.0}, 7.0) == {"place": 0.0, "process": 2.0, "imports": 5.0}
    assert with_place({"process": 1.0, "imports": 5.0}, 7.0) == {"place": 1.0, "process": 1.0, "imports": 5.0}


def test_when_this_process_began() -> None:
    with open(f"/proc/{os.getpid()}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    assert process_began() == pytest.approx(
        time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot, abs=2
    )


def test_no_phase_has_two_names_that_a_label_could_not_be() -> None:
    for phases in (start.DRIVER, *start.ACTOR.values()):
        assert len(set(phases)) == len(phases) and all(name.replace("_", "").isalpha() for name in phases)
