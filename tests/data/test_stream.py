"""Several sources: mixed by weight, each exactly once an epoch, resumed where they were; what a state must match."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo.data.prompts import eval_prompts, load_data, prompt_stream, train_prompts
from grpo.data.rendering import Rendering
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import ConfigError, DataError
from grpo.types import Prompt
from tests.data_helpers import configure, make_tokenizer, write_lines


def prompts(name, size):
    return [Prompt(f"{name}:{row}", "", "", (row,), name) for row in range(size)]


def mixed(seed=1, began="", **sources):
    """Sources by name, each with its size and weight."""
    streams = {name: PromptStream(prompts(name, size), seed) for name, (size, _) in sources.items()}
    return MixedStream(streams, {name: weight for name, (_, weight) in sources.items()}, began)


def rows(taken):
    return [(prompt.source, prompt.token_ids[0]) for prompt in taken]


def test_the_shares_are_those_of_the_weights_in_any_stretch():
    taken = [source for source, _ in rows(mixed(a=(7, 3.0), b=(100, 1.0), c=(2, 0.5)).take(900))]
    assert Counter(taken) == {"a": 600, "b": 200, "c": 100}
    for start in range(0, 900, 45):
        share = Counter(taken[start : start + 45])
        assert abs(share["a"] - 30) <= 1 and abs(share["b"] - 10) <= 1 and abs(share["c"] - 5) <= 1


def test_each_source_is_in_its_own_order():
    taken = rows(mixed(a=(7, 2.0), b=(5, 1.0)).take(90))
    for name, size in (("a", 7), ("b", 5)):
        alone = [row for source, row in taken if source == name]
        assert alone == [prompt.token_ids[0] for prompt in PromptStream(prompts(name, size), 1).take(len(alone))]
    assert taken != rows(mixed(seed=2, a=(7, 2.0), b=(5, 1.0)).take(90))


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=8), st.floats(0.01, 100))
def test_any_takes_saves_and_restores_give_one_mix(steps, weight):
    stream, taken = mixed(a=(5, 1.0), b=(3, weight)), []
    for count, restart in steps:
        if restart:
            state = json.loads(json.dumps(stream.state()))
            stream = mixed(a=(5, 1.0), b=(3, weight))
            stream.take(count)
            stream.restore(state)
        taken += rows(stream.take(count))
    assert taken == rows(mixed(a=(5, 1.0), b=(3, weight)).take(len(taken)))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"a": (5, 1.0)}, "belongs to the sources"),
        ({"a": (5, 1.0), "c": (3, 1.0)}, "belongs to the sources"),
        ({"a": (5, 1.0), "b": (4, 1.0)}, "fingerprint"),
    ],
)
def test_a_state_of_other_sources_is_refused_and_changes_nothing(other, says):
    stream = mixed(a=(5, 1.0), b=(3, 1.0))
    stream.take(4)
    fresh = mixed(**other)
    before = fresh.state()
    with pytest.raises(DataError, match=says):
        fresh.restore(stream.state())
    assert fresh.state() == before
    with pytest.raises(DataError, match="belongs to the sources"):
        fresh.restore(PromptStream(prompts("a", 5), 1).state())


def test_the_same_rows_with_other_tokens_are_refused_with_the_cause():
    stream = PromptStream([Prompt("x:1", "", "", (1, 2))], 1)
    state = stream.state()
    with pytest.raises(DataError, match=r"the token ids of the prompts are not: .* the template writes what changes"):
        PromptStream([Prompt("x:1", "", "", (1, 3))], 1).restore(state)
    older = {key: value for key, value in state.items() if key != "tokens"}
    stream.restore(older)


def test_the_time_that_the_prompts_have_seen_is_kept():
    assert "began" not in PromptStream(prompts("a", 2), 1).state()
    assert PromptStream(prompts("a", 2), 1, "2026-02-03T04:05:06").state()["began"] == "2026-02-03T04:05:06"
    assert mixed(a=(2, 1.0), began="2026-02-03T04:05:06").state()["began"] == "2026-02-03T04:05:06"


# From the configuration


def sources(in_tmp, **changes):
    for name, size in (("sums", 6), ("words", 3)):
        for split, first in (("train", 0), ("test", 100)):
            some = [{"question": f"{name} {n}?", "answer": str(n)} for n in range(first, first + size)]
            write_lines(in_tmp / f"{name}_{split}.jsonl", *some)
    named = [{"name": name, "source": f"{name}_{{split}}.jsonl"} for name in ("sums", "words")]
    named[0] |= {"weight": 2.0}
    named[1] |= {"rewards": [{"function": "exact"}]}
    return {"sources": named, **changes}


def test_several_sources_are_one_run(in_tmp):
    config = configure(sources(in_tmp))
    train, held_out = load_data(config, Rendering(config, make_tokenizer()))
    assert Counter(prompt.source for prompt in train.prompts) == {"sums": 6, "words": 3}
    assert Counter(prompt.source for prompt in held_out.prompts) == {"sums": 6, "words": 3}
    assert len({prompt.id for prompt in train.prompts}) == 9 and train.notes == held_out.notes == ()
    taken = prompt_stream(config, train.prompts).take(9)
    assert Counter(prompt.source for prompt in taken) == {"sums": 6, "words": 3}
    assert len({prompt.id for prompt in taken}) == 9


def test_the_rewards_of_a_source_say_which_answers_can_be_read(in_tmp):
    config = configure(sources(in_tmp))
    write_lines(in_tmp / "words_train.jsonl", {"question": "Capital of France?", "answer": "Paris"})
    assert len(train_prompts(config, make_tokenizer()).prompts) == 7
    write_lines(in_tmp / "sums_train.jsonl", {"question": "Capital of France?", "answer": "Paris"})
    with pytest.raises(DataError, match=r"sums_train\.jsonl:1: answer: the reward gsm8k compares numbers"):
        train_prompts(config, make_tokenizer())


def test_a_copy_in_another_source_is_told_with_both(in_tmp):
    config = configure(sources(in_tmp))
    write_lines(in_tmp / "words_train.jsonl", {"question": "sums 2?", "answer": "2"})
    (copies,) = train_prompts(config, make_tokenizer()).notes
    assert "(sums:3 = words:1)" in copies


def test_a_source_without_held_out_rows_is_named(in_tmp):
    data = sources(in_tmp)
    data["sources"][1]["source"] = "words_train.jsonl"
    with pytest.raises(
        ConfigError, match=r"both are words_train\.jsonl; .* write \{split\} in data\.sources\.1\.source"
    ):
        eval_prompts(configure(data), make_tokenizer())
    assert len(eval_prompts(configure(data, {"source": "words_test.jsonl"}), make_tokenizer()).prompts) == 3


def test_an_error_names_the_source(in_tmp):
    data = sources(in_tmp)
    data["sources"][1] |= {"source": "none.jsonl"}
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file .*; correct data\.sources\.1\.source"):
        train_prompts(configure(data), make_tokenizer())
    data["sources"][1] |= {"source": "words_train.jsonl", "answer_column": "solution"}
    with pytest.raises(DataError, match=r"correct it or set data\.sources\.1\.answer_column"):
        train_prompts(configure(data), make_tokenizer())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"sources": [{"name": "a", "source": "x.jsonl"}] * 2}, "two are called a; rename one"),
        ({"sources": [{"name": "a", "source": "x.jsonl"}], "source": "y.jsonl"}, "data.source has no meaning"),
        ({"sources": [{"name": "a", "source": "x.jsonl"}], "answer_column": "y"}, "data.answer_column has no meaning"),
        ({"sources": [{"source": "x.jsonl"}]}, "name"),
        ({"sources": [{"name": "a", "weight": 0}]}, "greater than 0"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(data, says):
    with pytest.raises(ValidationError, match=says):
        configure(data)
