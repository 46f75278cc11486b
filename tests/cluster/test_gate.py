"""Many sample, one is alone."""

import threading

import pytest

from grpo.cluster.gate import Gate


def nothing() -> None:
    pass


def test_who_wants_to_be_alone_waits_for_those_inside_and_goes_before_those_behind() -> None:
    gate, order = Gate(nothing), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def sample() -> None:
        with gate.sampling():
            inside.set()
            assert leave.wait(10)
            order.append("first")

    def alone() -> None:
        with gate.alone(), gate.alone():
            order.append("alone")

    def late() -> None:
        with gate.sampling():
            order.append("late")

    threads = [threading.Thread(target=sample), threading.Thread(target=alone)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    while not gate.waiting:
        pass
    threads.append(threading.Thread(target=late))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "alone", "late"]


def test_who_waits_looks_whether_that_makes_sense() -> None:
    def look() -> None:
        raise InterruptedError

    gate = Gate(look)
    with gate.sampling(), pytest.raises(InterruptedError), gate.alone():
        pass
    with gate.alone():  # the one that gave up does not count any more
        pass
