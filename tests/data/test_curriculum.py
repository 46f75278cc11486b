"""What a curriculum skips: exact values, and that neither timing nor resumes change it."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo.config import Config
from grpo.config.data import Curriculum
from grpo.config.supervised import supervised
from grpo.data.curriculum import FURTHEST, PassRates, parsed
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import DataError
from grpo.types import Prompt


def prompts(size, name="x"):
    return [Prompt(f"{name}:{row}", "", "", (row,), name) for row in range(size)]


def followed(size, seed=1, **rule):
    stream = PromptStream(prompts(size), seed)
    stream.follow(Curriculum(**rule))
    return stream


def ids(some):
    return [prompt.id for prompt in some]


def test_pass_rates_are_easy_and_hard_at_their_thresholds():
    rates = PassRates(Curriculum(easy_threshold=0.9, hard_threshold=0.1))
    rates.record(1, [("all", 8, 8), ("most", 9, 10), ("some", 8, 10), ("few", 2, 10), ("one", 1, 10), ("none", 0, 8)])
    found = {name: rates.difficulty(name, 1) for name in ("all", "most", "some", "few", "one", "none", "unknown")}
    assert found == {
        **{"all": "easy", "most": "easy", "some": None, "few": None, "one": "hard", "none": "hard", "unknown": None}
    }


def test_by_default_only_always_and_never_right_count():
    rates = PassRates(Curriculum())
    rates.record(1, [("a", 8, 8), ("b", 7, 8), ("c", 1, 8), ("d", 0, 8)])
    assert [rates.difficulty(name, 1) for name in "abcd"] == ["easy", None, None, "hard"]


def test_outcomes_count_from_their_batch_on_and_the_last_ones_alone():
    rates = PassRates(Curriculum())
    rates.record(2, [("a", 8, 8)])
    rates.record(5, [("a", 3, 8)])
    rates.record(7, [("a", 0, 8)])
    assert [rates.difficulty("a", known) for known in range(1, 9)] == [
        *[None, "easy", "easy", "easy", None, None, "hard", "hard"]
    ]
    wider = PassRates(Curriculum(window=2, hard_threshold=0.2))
    for batch, right in ((2, 8), (5, 3), (7, 0)):
        wider.record(batch, [("a", right, 8)])
    assert [wider.difficulty("a", known) for known in (2, 5, 7)] == ["easy", None, "hard"], "8/8, 11/16, 3/16"


def test_a_prompt_that_is_twice_in_a_batch_counts_with_all_its_completions():
    rates = PassRates(Curriculum())
    rates.record(1, [("a", 8, 8), ("a", 0, 8), ("b", 0, 4), ("b", 0, 4)])
    assert rates.state(1) == {"a": [(1, 8, 16)], "b": [(1, 0, 8)]}


SKIPPED = [("x:2", "easy"), ("x:0", "easy"), ("x:1", "easy"), ("x:1", "easy"), ("x:3", "hard"), ("x:0", "easy")]
DRAWN = ["x:7", "x:6", "x:5", "x:3", "x:4", "x:6", "x:5", "x:7"]


def test_which_turns_are_skipped_is_known():
    """By the coins of seed 1: exact prompts in exact order, epoch by epoch."""
    stream = followed(8, easy_fraction=0.3, hard_fraction=0.6)
    first = stream.choose(8)
    plain = PromptStream(prompts(8), 1)
    assert ids(first.prompts) == ids(plain.take(8)) and first.skipped == []
    stream.record(1, [(f"x:{row}", 8 if row < 3 else 0 if row < 6 else 4, 8) for row in range(8)])
    second = stream.choose(8, known=1)
    assert second.skipped == SKIPPED
    assert ids(second.prompts) == DRAWN
    turns = ids(plain.take(8 + len(SKIPPED)))
    left = Counter(turns) - Counter(name for name, _ in SKIPPED)
    assert left == Counter(DRAWN)
    assert (stream.turns, stream.taken, stream.skipped) == (16 + len(SKIPPED), 16, len(SKIPPED))


def test_what_is_not_known_yet_changes_nothing():
    stream, plain = followed(8), PromptStream(prompts(8), 1)
    stream.choose(8)
    stream.record(3, [(f"x:{row}", 8, 8) for row in range(8)])
    chosen = stream.choose(16, known=2)
    assert ids(chosen.prompts) == ids(plain.take(24))[8:] and chosen.skipped == []


@pytest.mark.parametrize("right", [0, 8])
def test_fractions_are_shares_of_all_epochs(right):
    stream = followed(50, easy_fraction=0.2, hard_fraction=0.2)
    stream.record(1, [(f"x:{row}", right, 8) for row in range(50)])
    taken = stream.choose(4000, known=1)
    assert stream.turns == pytest.approx(20000, rel=0.05)
    share = Counter(prompt.id for prompt in taken.prompts)
    assert len(share) == 50 and max(share.values()) < 2 * min(share.values()), "no prompt is preferred"


def test_fractions_of_one_are_no_curriculum():
    stream, plain = followed(8, easy_fraction=1, hard_fraction=1), PromptStream(prompts(8), 1)
    stream.record(1, [(f"x:{row}", 8 * (row % 2), 8) for row in range(8)])
    chosen = stream.choose(100, known=1)
    assert ids(chosen.prompts) == ids(plain.take(100)) and chosen.skipped == []
    assert stream.state() == plain.state()


def test_even_if_all_are_easy_and_the_fraction_is_the_smallest_prompts_come():
    stream = followed(2, easy_fraction=0.01, hard_fraction=0.01)
    stream.record(1, [("x:0", 8, 8), ("x:1", 0, 8)])
    chosen = stream.choose(20, known=1)
    assert len(chosen.prompts) == 20 and set(ids(chosen.prompts)) == {"x:0", "x:1"}
    assert stream.turns == 20 + len(chosen.skipped)
    assert set(chosen.skipped) == {("x:0", "easy"), ("x:1", "hard")}


def mixed(rule):
    streams = {name: PromptStream(prompts(size, name), 1) for name, size in (("a", 7), ("b", 5))}
    stream = MixedStream(streams, {"a": 2.0, "b": 1.0})
    stream.follow(rule)
    return stream


def test_shares_of_sources_are_those_of_their_weights_whatever_is_skipped():
    stream = mixed(Curriculum(easy_fraction=0.05))
    stream.record(1, [(f"a:{row}", 8, 8) for row in range(7)])
    chosen = stream.choose(90, known=1)
    assert Counter(prompt.source for prompt in chosen.prompts) == {"a": 60, "b": 30}
    assert {name[0] for name, _ in chosen.skipped} == {"a"} and len(chosen.skipped) > 300
    state = json.loads(json.dumps({**stream.state(), **stream.recorded(1)}))
    again = mixed(Curriculum(easy_fraction=0.05))
    again.restore(state)
    assert again.choose(30, known=1) == stream.choose(30, known=1)


def test_a_refused_state_changes_nothing():
    stream = mixed(Curriculum())
    stream.record(1, [("a:1", 8, 8)])
    before = {**stream.state(), **stream.recorded(1)}
    state = json.loads(json.dumps(before))
    for damage in (
        {"curriculum": {"a:1": [[1, 9, 8]]}},
        {"sources": {**state["sources"], "b": {"fingerprint": "x"}}},
        {"sources": {**state["sources"], "b": {**state["sources"]["b"], "skipped": 3}}},
    ):
        with pytest.raises(DataError):
            stream.restore({**state, **damage})
        assert {**stream.state(), **stream.recorded(1)} == before


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        "x",
        7,
        {"x:1": []},
        {"x:1": 3},
        {"x:1": [[1, 2]]},
        {"x:1": [[1, 3, 2]]},
        {"x:1": [[1, -1, 2]]},
        {"x:1": [[0, 1, 2]]},
        {"x:1": [[1, 0, 0]]},
        {"x:1": [[1, True, 2]]},
        {"x:1": [[1, 1.0, 2]]},
        {"x:1": [[2, 1, 2], [1, 1, 2]]},
        {"x:1": [[1, 1, 2], [1, 1, 2]]},
        {"x:1": None},
    ],
)
def test_damaged_pass_rates_are_refused(damaged):
    with pytest.raises(DataError, match="pass rates are damaged"):
        parsed(damaged)
    with pytest.raises(DataError, match="pass rates are damaged"):
        stream = followed(4)
        stream.restore({**stream.state(), "curriculum": damaged})


def test_a_state_of_a_run_without_a_curriculum_begins_one_that_knows_nothing():
    plain = PromptStream(prompts(8), 1)
    plain.take(5)
    stream = followed(8)
    stream.record(1, [("x:1", 8, 8)])
    stream.restore(plain.state())
    assert stream.recorded(9) == {"curriculum": {}} and stream.taken == 5
    stream.choose(20, known=0)
    plain.restore({**stream.state(), **stream.recorded(1)})
    assert plain.recorded(1) == {} and plain.turns == stream.turns


OUTCOMES = st.lists(
    st.lists(st.tuples(st.sampled_from(["x:0", "x:1", "x:2"]), st.integers(0, 4)), max_size=4), min_size=1, max_size=90
)


@given(OUTCOMES, st.integers(1, 3), st.integers(0, FURTHEST), st.randoms(use_true_random=False), st.data())
def test_the_order_in_which_outcomes_come_changes_nothing(batches, window, ahead, random, data):
    """Batches come in any order within what may be ahead; asked is only what a clock allows."""
    rule = Curriculum(window=window, easy_threshold=0.75, hard_threshold=0.25)
    all_of = {number: [(name, right, 4) for name, right in some] for number, some in enumerate(batches, start=1)}
    plain, late = PassRates(rule), PassRates(rule)
    for number in all_of:
        plain.record(number, all_of[number])
    waiting, done = sorted(all_of), 0
    while waiting:
        number = random.choice([one for one in waiting if one <= done + 1 + ahead])
        late.record(number, all_of[number])
        waiting.remove(number)
        done = min(waiting, default=len(batches) + 1) - 1
        asked = data.draw(st.integers(max(0, done - ahead), done)) if not done % 7 else done
        exact = PassRates(rule)
        for before in range(1, asked + 1):
            exact.record(before, all_of[before])
        names = ("x:0", "x:1", "x:2")
        assert [late.difficulty(name, asked) for name in names] == [exact.difficulty(name, asked) for name in names]
        exact = PassRates(rule)
        for before in range(1, done + 1):
            exact.record(before, all_of[before])
        assert json.dumps(late.state(done)) == json.dumps(exact.state(done)), "byte for byte"
    assert late.state(len(batches)) == plain.state(len(batches))


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=80),
    st.integers(0, 5),
    st.integers(1, 3),
    st.data(),
)
def test_a_resume_anywhere_is_no_resume(rights, ahead, window, data):
    """Batches are taken up to `ahead` before their outcomes; the state goes through JSON."""
    rule = {"window": window, "easy_fraction": 0.2, "hard_fraction": 0.3}

    def go(stream, first):
        chosen = []
        for batch in range(first, len(rights) + 1):
            some = stream.choose(3, batch - 1 - ahead)
            stream.record(
                batch, [(prompt.id, right, 4) for prompt, right in zip(some.prompts, rights[batch - 1], strict=True)]
            )
            chosen.append((ids(some.prompts), some.skipped, {**stream.state(), **stream.recorded(batch)}))
        return chosen

    whole = go(followed(5, **rule), 1)
    at = data.draw(st.integers(1, len(rights) - 1))
    again = followed(5, **rule)
    again.restore(json.loads(json.dumps(whole[at - 1][2])))
    rest = go(again, at + 1)
    assert json.loads(json.dumps(rest)) == json.loads(json.dumps(whole[at:]))


def test_how_far_a_choice_may_be_ahead_is_what_the_configuration_allows():
    assert Config.model_validate({"model": {"path": "x"}, "rollout": {"max_staleness": FURTHEST}})
    with pytest.raises(ValidationError):
        Config.model_validate({"model": {"path": "x"}, "rollout": {"max_staleness": FURTHEST + 1}})


# The section


def configured(rule):
    return Config.model_validate({"model": {"path": "x"}, "data": {"curriculum": rule}})


def test_the_section_is_off_unless_it_is_written():
    assert Config.model_validate({"model": {"path": "x"}}).data.curriculum is None
    assert configured({}).data.curriculum == Curriculum(
        **{"easy_threshold": 1.0, "hard_threshold": 0.0, "easy_fraction": 0.2, "hard_fraction": 0.5},
        **{"window": 1, "pass_reward": 1.0},
    )
    assert supervised(configured({})).data.curriculum is None, "a warm-up has no rewards"


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"easy_fraction": 0}, "easy_fraction"),
        ({"hard_fraction": 0.009}, "greater than or equal to 0.01"),
        ({"hard_fraction": 1.1}, "less than or equal to 1"),
        ({"easy_threshold": 0}, "greater than 0"),
        ({"easy_threshold": 1.5}, "less than or equal to 1"),
        ({"hard_threshold": 1}, "less than 1"),
        ({"easy_threshold": 0.4, "hard_threshold": 0.4}, "not easy and hard at once: .*hard_threshold = 0.4"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"pass_reward": float("nan")}, "finite"),
        ({"easy": 0.1}, "easy"),
        (True, "must not be true"),
        ("online", "curriculum"),
    ],
)
def test_what_cannot_be_meant_is_refused(rule, says):
    with pytest.raises(ValidationError, match=says):
        configured(rule)
