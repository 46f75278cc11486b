"""Batches drawn ahead, in a loop whose parts take as long as each test says; the real ones are in tests of runs."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import CheckpointError, WeightSyncError
from grpo.rollout.drawn import load_drawn
from tests.rollout.simulated import Loop, make_config

MODES = ("between_batches", "in_flight")


def ids(loop: Loop) -> list[list[str]]:
    """Prompts of the batches, in order."""
    return [[group.prompt.id for group in batch.groups] for batch in loop.batches.values()]


def in_order(steps: int, per_step: int = 3) -> list[list[str]]:
    return [[f"fake:{step * per_step + place}" for place in range(per_step)] for step in range(steps)]


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_between_batches_every_sample_is_of_the_one_version_that_the_clock_says(staleness: int) -> None:
    loop = Loop(make_config(staleness)).run(6)
    versions = [{sample.versions for sample in batch.samples} for batch in loop.batches.values()]
    assert versions == [{((0, max(step - 1 - staleness, 0)),)} for step in range(1, 7)]
    assert ids(loop) == in_order(6)


def test_a_run_that_never_syncs_ahead_is_the_same_with_and_without_delays() -> None:
    quick = Loop(make_config(1)).run(6)
    slow = Loop(make_config(1), delay=lambda what, step: 0.02 * ((step * 7 + len(what)) % 3)).run(6)
    assert quick.history == slow.history and len(set(quick.history.values())) == 7


def test_two_steps_between_versions_make_samples_a_step_older() -> None:
    loop = Loop(make_config(1, steps=7, sync={"every": 2}, checkpoint={"every": 2})).run(7)
    versions = [batch.samples[0].oldest_version for batch in loop.batches.values()]
    assert versions == [0, 0, 0, 2, 2, 4, 4]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(MODES),
    st.integers(1, 3),
    st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=5, max_size=5),
    st.booleans(),
)
def test_whatever_takes_long_prompts_come_once_in_order_and_are_never_too_old(
    update: str, staleness: int, delays: list[tuple[int, int, int]], refill: bool
) -> None:
    places = {"sample": 0, "score": 1, "train": 2}
    config = make_config(staleness, update, steps=5, rollout={"refill": refill})
    loop = Loop(config, lambda what, step: 0.001 * delays[step % 5][places[what]]).run(5)
    took = [
        group.prompt.id
        for batch in loop.batches.values()
        for group in sorted([*batch.groups, *batch.skipped], key=lambda group: int(group.prompt.id[5:]))
    ]
    assert took == [f"fake:{place}" for place in range(len(took))]
    for step, batch in loop.batches.items():
        for sample in batch.samples:
            assert 0 <= sample.lag(step) <= staleness
            assert sample.newest_version < step


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("refill", [False, True])
def test_a_resumed_run_trains_on_what_was_drawn_and_goes_on(update: str, staleness: int, refill: bool) -> None:
    config = make_config(staleness, update, steps=7, rollout={"refill": refill})
    whole = Loop(config)
    whole.resume(whole.start)
    states = [whole.advance() for _ in range(7)]
    third = states[2]()
    whole.close()
    again = Loop(config)
    again.resume(third)
    assert third.step == 3 and len(load_drawn(third.drawn).draws) == staleness
    while again.step < 7:
        again.advance()
    again.close()
    behind = range(4, 4 + staleness)
    for step in behind:
        assert again.batches[step].samples == whole.batches[step].samples
        assert again.batches[step].skipped == whole.batches[step].skipped
    assert ids(whole)[3:] == ids(again) or refill
    if update == "between_batches":
        assert again.history[7] == whole.history[7] and ids(whole)[3:] == ids(again)


def test_a_loop_that_goes_back_draws_the_same_again() -> None:
    """A lost trainer: the feeder is in the middle of a batch."""
    config = make_config(2, steps=8)
    whole = Loop(config).run(8)
    loop = Loop(config, lambda what, step: 0.01)
    loop.resume(loop.start)
    states = [loop.advance() for _ in range(4)]
    second = states[1]()
    loop.resume(second)
    while loop.step < 8:
        loop.advance()
    loop.close()
    assert loop.history == whole.history


def test_another_rule_of_versions_draws_again_from_the_weights_of_the_checkpoint() -> None:
    loop = Loop(make_config(2, steps=6))
    loop.resume(loop.start)
    second = [loop.advance() for _ in range(2)][1]()
    loop.close()
    other = Loop(make_config(1, steps=6))
    other.resume(second)
    while other.step < 6:
        other.advance()
    other.close()
    assert ids(other) == in_order(6)[2:]
    assert [batch.samples[0].oldest_version for batch in other.batches.values()] == [2, 2, 3, 4]
    inline = Loop(make_config(0, steps=6))
    inline.resume(second)
    inline.advance()
    assert ids(inline) == in_order(6)[2:3]


def test_an_error_ahead_is_raised_for_its_batch_and_not_before() -> None:
    loop = Loop(make_config(2, steps=6))
    generate = loop.engines.generate

    def fails_at_3(prompts, sampling, step, first=0):  # type: ignore[no-untyped-def]
        if step == 3:
            raise ValueError("row 7 is broken")
        return generate(prompts, sampling, step, first)

    loop.engines.generate = fails_at_3  # type: ignore[method-assign]
    loop.resume(loop.start)
    state = loop.advance()
    loop.advance()
    with pytest.raises(ValueError, match="row 7 is broken"):
        loop.advance()
    with pytest.raises(ValueError, match="row 7 is broken"):
        state()  # step 1 needs batches 2 and 3
    loop.close()


def test_a_sample_of_weights_that_its_batch_may_not_have_is_refused() -> None:
    loop = Loop(make_config(1, steps=4))
    hold = loop.engines.hold
    loop.engines.hold = lambda version: hold(version) if version < 2 else None  # type: ignore[method-assign]
    loop.resume(loop.start)
    with pytest.raises(WeightSyncError, match="must come from weight version 2, but sample 0 of prompt fake:9 says 1"):
        for _ in range(4):
            loop.advance()
    loop.close()


@pytest.mark.parametrize("content", [b"", b"{}\n", b"x", b'{"rule": {}}\n{"step": 1}\n', b'{"rule": {}}\n[]\n'])
def test_damaged_batches_are_named(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="drawn.jsonl: must hold the batches"):
        load_drawn(content)


def test_both_pools_work_at_the_same_time() -> None:
    """Sampling and training of 40 ms each: the feeder is a batch ahead whenever the loop asks."""
    loop = Loop(make_config(1, steps=12), lambda what, step: {"sample": 0.04, "train": 0.04, "score": 0.0}[what])
    loop.resume(loop.start)
    loop.advance()
    began = time.monotonic()
    while loop.step < 12:
        loop.advance()
    loop.close()
    print(f"{(time.monotonic() - began) / 11 * 1000:.0f} ms a step of 40 + 40")
    assert max(version for _, version in loop.engines.asked) == 10
