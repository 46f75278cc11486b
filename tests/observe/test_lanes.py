import threading

import pytest

from grpo.observe.lanes import Lanes


class Clock:
    """perf_counter that goes forward by what it is told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("grpo.observe.lanes.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def spans_of(lanes_of_a_run):
    return [(span.lane, span.what, span.step, span.track) for span in lanes_of_a_run]


class Other:
    """A thread in which spans begin and end when the test says so."""

    def __init__(self, lanes):
        self._lanes, self._go, self._done = lanes, threading.Event(), threading.Event()

    def begin(self, lane, what, step):
        def work():
            with self._lanes.span(lane, what, step):
                self._done.set()
                assert self._go.wait(30)

        self._thread = threading.Thread(target=work)
        self._thread.start()
        assert self._done.wait(30)

    def end(self):
        self._go.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_the_synchronous_loop_has_both_lanes_from_its_phases(clock):
    ended = []
    lanes = Lanes(ended.append, overlapped=False)
    lanes.step_started()
    for phase, seconds in (("rollout", 4.0), ("reward", 1.0), ("advantage", 1.0), ("train", 3.0), ("weight_sync", 1.0)):
        with lanes.phase(phase, 1):
            clock.now += seconds
    assert lanes.step_ended() == {"pipeline/rollout_idle": 0.5, "pipeline/trainer_idle": 0.6}
    assert [(span.lane, span.what, span.end - span.start) for span in ended] == [
        ("rollout", "sample", 4.0),
        ("rollout", "reward", 1.0),
        ("trainer", "train", 3.0),
        ("trainer", "sync", 1.0),
        ("rollout", "sync", 1.0),
    ]


def test_to_wait_for_a_batch_is_no_work_of_the_engines_in_an_overlapped_loop(clock):
    lanes = Lanes(lambda span: None, overlapped=True)
    lanes.step_started()
    for phase in ("rollout", "train"):
        with lanes.phase(phase, 1):
            clock.now += 2.0
    assert lanes.step_ended() == {"pipeline/rollout_idle": 1.0, "pipeline/trainer_idle": 0.5}


def test_time_between_two_steps_counts_to_the_second(clock):
    lanes = Lanes(lambda span: None, overlapped=False)
    lanes.step_started()
    with lanes.phase("train", 1):
        clock.now += 1.0
    lanes.step_ended()
    with lanes.phase("checkpoint", 1):
        clock.now += 1.0
    with lanes.phase("eval", 1):
        clock.now += 2.0
    lanes.step_started()
    with lanes.phase("train", 2):
        clock.now += 1.0
    assert lanes.step_ended() == {"pipeline/rollout_idle": 0.5, "pipeline/trainer_idle": 0.5}


def test_a_pool_is_busy_while_one_of_several_spans_is_open_and_work_beside_it_is_not_its_own(clock):
    ended = []
    lanes = Lanes(ended.append, overlapped=True)
    lanes.step_started()
    first, second, third = Other(lanes), Other(lanes), Other(lanes)
    first.begin("rollout", "sample", 2)
    clock.now += 1.0
    second.begin("rollout", "sample", 3)
    third.begin("rollout", "receive", 1)
    clock.now += 1.0
    first.end()
    clock.now += 1.0
    second.end()
    clock.now += 1.0  # it still receives, but nothing is sampled
    fourth = Other(lanes)
    fourth.begin("rollout", "sample", 4)
    third.end()
    clock.now += 4.0
    assert lanes.step_ended() == {"pipeline/rollout_idle": 1 / 8, "pipeline/trainer_idle": 1.0}
    clock.now += 1.0  # what is still open counts on in the next window
    fourth.end()
    clock.now += 1.0
    assert lanes.step_ended() == {"pipeline/rollout_idle": 0.5, "pipeline/trainer_idle": 1.0}
    assert spans_of(ended) == [
        ("rollout", "sample", 2, 0),
        ("rollout", "sample", 3, 1),
        ("rollout", "receive", 1, 2),
        ("rollout", "sample", 4, 0),
    ]


def test_a_span_in_the_phase_that_stands_for_it_is_not_told_twice(clock):
    ended = []
    lanes = Lanes(ended.append, overlapped=True)
    with lanes.phase("train", 3), lanes.span("trainer", "train", 3), lanes.span("trainer", "publish", 3):
        clock.now += 1.0
    assert spans_of(ended) == [("trainer", "publish", 3, 0), ("trainer", "train", 3, 0)]


def test_what_fails_ends_its_span_too(clock):
    ended = []
    lanes = Lanes(ended.append, overlapped=True)
    lanes.step_started()
    with pytest.raises(RuntimeError), lanes.span("trainer", "train", 1):
        clock.now += 1.0
        raise RuntimeError("lost")
    clock.now += 1.0
    assert lanes.step_ended()["pipeline/trainer_idle"] == 0.5
    assert spans_of(ended) == [("trainer", "train", 1, 0)]


def test_after_going_back_idle_time_is_counted_from_the_next_step(clock):
    lanes = Lanes(lambda span: None, overlapped=False)
    lanes.step_started()
    lanes.step_ended()
    clock.now += 50.0
    lanes.rewound()
    lanes.step_started()
    with lanes.phase("train", 1):
        clock.now += 1.0
    assert lanes.step_ended() == {"pipeline/rollout_idle": 1.0, "pipeline/trainer_idle": 0.0}


def test_a_step_that_takes_no_time_has_no_share(clock):
    lanes = Lanes(lambda span: None, overlapped=False)
    lanes.step_started()
    assert lanes.step_ended() == {}
