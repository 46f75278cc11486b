"""Data: what is refused and how it is named, prompts' names, held-out prompts and the exactly-once stream."""

import hashlib
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.data.prompts import PromptStream, eval_prompts, train_prompts
from grpo.errors import ConfigError, DataError
from grpo.types import Prompt
from tests.data_helpers import CHAT, GOOD, configure, failure, make_tokenizer, write_lines

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"

# Hostile rows: what stands in line 2 of a file, the field that the error names, and a word of what it says.
HOSTILE = {
    "null row": (b"null\n", "row", "null"),
    "number row": (b"17\n", "row", "int 17"),
    "text row": (b'"question"\n', "row", "str"),
    "array row": (b"[1, 2]\n", "row", "list"),
    "true row": (b"true\n", "row", "bool True"),
    "empty object": (b"{}\n", "question", "no such column"),
    "cut off": (b'{"question": "1+1?", "ans\n', "row", "not valid JSON"),
    "single quotes": (b"{'question': '1+1?', 'answer': '2'}\n", "row", "not valid JSON"),
    "trailing comma": (b'{"question": "1", "answer": "2",}\n', "row", "not valid JSON"),
    "two objects": (b'{"question": "1", "answer": "2"} {}\n', "row", "Extra data"),
    "comment": (b"# a comment\n", "row", "not valid JSON"),
    "raw tab": (b'{"question": "1\t1", "answer": "2"}\n', "row", "Invalid control character"),
    "bad escape": (b'{"question": "\\x41", "answer": "2"}\n', "row", "escape"),
    "deep nesting": (b"[" * 100_000 + b"\n", "row", "recursion"),
    "endless number": (b'{"question": ' + b"9" * 5000 + b', "answer": "2"}\n', "row", "4300"),
    "byte order mark inside": (b"\xef\xbb\xbf{}\n", "row", "BOM"),
    "utf-16": ('{"question": "1+1?", "answer": "2"}'.encode("utf-16") + b"\n", "row", "not UTF-8 (byte 0xff"),
    "nul bytes": (b"\0\0\0\0\n", "row", "not valid JSON"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\n", "row", "byte 0x8b"),
    "latin-1 question": (b'{"question": "caf\xe9?", "answer": "2"}\n', "question", "byte 0xe9 at character 4"),
    "latin-1 answer": (b'{"question": "1", "answer": "\xff"}\n', "answer", "byte 0xff"),
    "cut utf-8": (b'{"question": "\xe2\x82", "answer": "2"}\n', "question", "byte 0xe2"),
    "encoded surrogate": (b'{"question": "\xed\xa0\x80", "answer": "2"}\n', "question", "byte 0xed"),
    "bad byte elsewhere": (b'{"id": "\xff", "question": "1", "answer": "2"}\n', "id", "byte 0xff"),
    "bad byte below": (b'{"question": "1", "answer": "2", "meta": {"id": "\xff"}}\n', "id", "byte 0xff"),
    "half a pair": (b'{"question": "\\ud83d", "answer": "2"}\n', "question", "surrogate pair, \\ud83d"),
    "question twice": (b'{"question": "1", "question": "2", "answer": "2"}\n', "question", "twice"),
    "no question": ({"answer": "2"}, "question", "no such column among 'answer'"),
    "no answer": ({"question": "1+1?"}, "answer", "no such column among 'question'"),
    "other case": ({"Question": "1+1?", "answer": "2"}, "question", "'Question'"),
    "null question": ({"question": None, "answer": "2"}, "question", "null"),
    "null answer": ({"question": "1+1?", "answer": None}, "answer", "null"),
    "number question": ({"question": 2, "answer": "2"}, "question", "int 2"),
    "float answer": (b'{"question": "1+1?", "answer": NaN}\n', "answer", "float nan"),
    "true answer": ({"question": "1+1?", "answer": True}, "answer", "bool True"),
    "list question": ({"question": ["1+1?"], "answer": "2"}, "question", "message 1 must have role and content"),
    "object answer": ({"question": "1+1?", "answer": {"value": "2"}}, "answer", "dict"),
    "empty question": ({"question": "", "answer": "2"}, "question", "is empty"),
    "blank question": ({"question": " \t\n", "answer": "2"}, "question", "is empty"),
    "blank answer": ({"question": "1+1?", "answer": "\u3000"}, "answer", "is empty"),
    "too long": ({"question": "x" * 96, "answer": "2"}, "question", "97 tokens"),
    "huge": ({"question": "x" * 30_000_000, "answer": "2"}, "question", "over 30000 tokens"),
}


@pytest.mark.parametrize("row, field, says", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_row_is_named(row, field, says, in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", GOOD, row, GOOD)
    first, last = failure(configure({"source": "rows.jsonl"}), tokenizer).splitlines()
    assert first.startswith(f"rows.jsonl:2: {field}: ")
    assert says in first and "; " in first
    assert last.startswith("1 of 3 rows of rows.jsonl cannot be used; ") and "data.on_bad_row: skip" in last
    assert len(first) < 400


@pytest.mark.parametrize("row, field, says", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_row_is_skipped_and_counted(row, field, says, in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", GOOD, row, GOOD)
    loaded = train_prompts(configure({"source": "rows.jsonl", "on_bad_row": "skip"}), tokenizer)
    assert loaded.skipped == 1
    assert [prompt.id.split(":")[1] for prompt in loaded.prompts] == ["1", "3"]


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_named_problem(tmp_path_factory, tokenizer, junk):
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    write_lines(path, GOOD, junk.replace(b"\n", b"") + b"\n")
    try:
        loaded = train_prompts(configure({"source": str(path)}), tokenizer)
    except DataError as error:
        assert str(error).startswith(f"{path}:2: ")
    else:
        assert len(loaded.prompts) == 1 and not junk.replace(b"\n", b"").strip()


def test_five_problems_are_shown_and_all_are_counted(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", GOOD, *[{"question": number, "answer": "2"} for number in range(7)])
    *shown, last = failure(configure({"source": "rows.jsonl"}), tokenizer).splitlines()
    assert [line.split(": ")[0] for line in shown] == [f"rows.jsonl:{number}" for number in range(2, 7)]
    assert last.startswith("7 of 8 rows")


def test_problems_found_by_tokens_come_in_the_order_of_the_rows(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", {"question": "x" * 200, "answer": "2"}, b"null\n", GOOD)
    lines = failure(configure({"source": "rows.jsonl"}), tokenizer).splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_nothing_but_bad_rows_fails_even_when_skipping(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", b"null\n", {"prompt": "1+1?"})
    message = failure(configure({"source": "rows.jsonl", "on_bad_row": "skip"}), tokenizer)
    assert "rows.jsonl:1: row: " in message and "data.question_column" in message and "2 of 2 rows" in message


def test_lines_are_counted_as_an_editor_counts_them(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n", b"\r\n", b"  \n", b"null")
    assert failure(configure({"source": "rows.jsonl"}), tokenizer).startswith("rows.jsonl:4: row: ")


def test_the_longest_prompt_that_leaves_room_is_used(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", {"question": "x" * 95, "answer": "2"})
    (prompt,) = train_prompts(configure({"source": "rows.jsonl"}), tokenizer).prompts
    assert len(prompt.token_ids) == 96 == 128 - 32


# Held-out prompts


def test_eval_reads_its_own_split_source_and_subset(in_tmp, tokenizer, monkeypatch):
    write_lines(in_tmp / "train.jsonl", GOOD)
    write_lines(in_tmp / "test.jsonl", {"question": "3+3?", "answer": "6"})
    by_split = configure({"source": "{split}.jsonl"})
    assert [prompt.question for prompt in train_prompts(by_split, tokenizer).prompts] == ["1+1?"]
    assert [prompt.question for prompt in eval_prompts(by_split, tokenizer).prompts] == ["3+3?"]
    by_source = configure({"source": "train.jsonl"}, {"source": "test.jsonl"})
    assert eval_prompts(by_source, tokenizer) == eval_prompts(by_split, tokenizer)

    import datasets

    asked = []

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision[:1]))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = {"source": "a/b", "subset": "main", "revision": "a" * 40}
    eval_prompts(configure(data), tokenizer)
    eval_prompts(configure(data, {"source": "c/d", "revision": "c" * 40}), tokenizer)
    held_out = {"source": "c/d", "subset": "x", "split": "dev", "revision": "d" * 40}
    eval_prompts(configure({"source": "a/b"}, held_out), tokenizer)
    assert asked == [("a/b", "main", "test", "a"), ("c/d", None, "test", "c"), ("c/d", "x", "dev", "d")]


def test_an_error_of_eval_names_the_eval_key(in_tmp, tokenizer):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file .*; correct eval\.source"):
        eval_prompts(configure({"source": "arithmetic"}, {"source": "none.jsonl"}), tokenizer)


@pytest.mark.parametrize(
    "data, held_out", [({"source": "rows.jsonl"}, {}), ({"source": "arithmetic"}, {"split": "train"})]
)
def test_held_out_prompts_are_not_those_of_the_training(data, held_out, in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", GOOD)
    with pytest.raises(ConfigError, match="eval.source: held-out prompts must not be those of the training"):
        eval_prompts(configure(data, held_out), tokenizer)
    assert eval_prompts(configure(data, {"prompts": 0}), tokenizer).prompts == ()
    on_purpose = {"source": data["source"], "split": "train", "prompts": 1}
    assert len(eval_prompts(configure(data, on_purpose, max_length=256), tokenizer).prompts) == 1


def test_eval_chooses_the_same_rows_whatever_the_seed_and_their_order(in_tmp, tokenizer):
    rows = [{"question": f"{number}+{number}?", "answer": str(2 * number)} for number in range(50)]
    write_lines(in_tmp / "rows.jsonl", *rows)
    write_lines(in_tmp / "reversed.jsonl", *reversed(rows))

    def chosen(name, prompts, seed=0):
        config = configure({"source": "arithmetic"}, {"source": name, "prompts": prompts})
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        return [prompt.question for prompt in eval_prompts(config, tokenizer).prompts]

    ten = chosen("rows.jsonl", 10)
    assert len(set(ten)) == 10 and ten != [row["question"] for row in rows[:10]]
    assert ten == sorted(ten, key=lambda question: int(question.split("+")[0])), "in the order of the file"
    assert chosen("rows.jsonl", 10, seed=7) == ten == chosen("reversed.jsonl", 10)[::-1]
    assert chosen("rows.jsonl", 99) == [row["question"] for row in rows]


def test_a_whole_evaluation_takes_every_row_and_of_what_has_no_end_eval_prompts(in_tmp, tokenizer):
    rows = [{"question": f"{number}+{number}?", "answer": str(2 * number)} for number in range(30)]
    write_lines(in_tmp / "test.jsonl", *rows)

    def counted(data, held_out=None):
        config = configure(data, {"prompts": 4} | (held_out or {}), max_length=256)
        return len(eval_prompts(config, tokenizer, whole=True).prompts)

    named = [{"name": "made", "source": "arithmetic"}, {"name": "own", "source": "{split}.jsonl"}]
    assert counted({"source": "{split}.jsonl"}) == 30
    assert counted({"source": "arithmetic"}) == 4
    assert counted({"sources": named}) == 4 + 30
    assert counted({"sources": named[1:]}, {"source": "arithmetic"}) == 4


# Fingerprint


def test_the_fingerprint_names_the_content(in_tmp, tokenizer):
    rows = [GOOD, {"question": "2+2?", "answer": "4"}]

    def source_id(rows, tokenizer=tokenizer, **data):
        write_lines(in_tmp / "rows.jsonl", *rows)
        loaded = train_prompts(configure({"source": "rows.jsonl", **data}), tokenizer)
        assert [prompt.id.partition(":")[2] for prompt in loaded.prompts] == [str(n + 1) for n in range(len(rows))]
        (name,) = {prompt.id.partition(":")[0] for prompt in loaded.prompts}
        return name

    ids = [
        source_id(rows),
        source_id(rows[::-1]),
        source_id(rows[:1]),
        source_id([*rows, GOOD]),
        source_id([{**GOOD, "answer": "#### 2 "}, rows[1]]),
        source_id([{"question": "1+1?#### 2", "answer": "1"}, rows[1]]),
        source_id([{"question": "1+1?", "answer": "#### 21"}, rows[1]]),
        source_id(rows, prompt_format="{question} "),
        source_id(rows, make_tokenizer(CHAT)),
        source_id(rows, make_tokenizer(CHAT), system_prompt="Be exact."),
        source_id(rows, make_tokenizer(CHAT + " ")),
    ]
    assert len(set(ids)) == len(ids)
    assert source_id([{**row, "other": "column"} for row in rows]) == ids[0]


# The stream


def make_prompts(size, source="abc"):
    return [Prompt(f"{source}:{row}", "", "", (row,)) for row in range(size)]


def rows_of(prompts):
    return [prompt.token_ids[0] for prompt in prompts]


@given(
    size=st.integers(1, 20),
    seed=st.integers(0, 2**64),
    steps=st.lists(st.tuples(st.integers(0, 45), st.booleans()), max_size=8),
)
def test_any_takes_saves_and_restores_give_one_order(size, seed, steps):
    prompts = make_prompts(size)
    stream, taken = PromptStream(prompts, seed), []
    for count, restart in steps:
        if restart:
            state = json.loads(json.dumps(stream.state()))
            stream = PromptStream(make_prompts(size), seed)
            stream.take(count)
            stream.restore(state)
        batch = stream.take(count)
        assert len(batch) == count
        taken += rows_of(batch)
    assert taken == rows_of(PromptStream(prompts, seed).take(len(taken)))
    for start in range(0, len(taken), size):
        epoch = Counter(taken[start : start + size])
        assert set(epoch.values()) <= {1} and (len(epoch) == size or start + size > len(taken))


def test_seed_and_epoch_decide_the_order():
    first = rows_of(PromptStream(make_prompts(8), seed=1).take(16))
    keys = [[hashlib.sha256(b"[1, %d, %d]" % (epoch, row)).digest() for row in range(8)] for epoch in range(2)]
    assert first == [row for epoch in keys for row in sorted(range(8), key=epoch.__getitem__)]
    assert first[:8] != first[8:]
    assert first != rows_of(PromptStream(make_prompts(8), seed=2).take(16))


def test_the_stream_has_its_own_randomness():

    random.seed(0)
    before = random.getstate()
    PromptStream(make_prompts(8), seed=1).take(20)
    assert random.getstate() == before


@pytest.mark.parametrize(
    "prompts, seed, names",
    [
        (make_prompts(8, source="other"), 1, "fingerprint"),
        (make_prompts(7), 1, "fingerprint"),
        (make_prompts(8)[::-1], 1, "fingerprint"),
        (make_prompts(8), 2, "seed"),
    ],
)
def test_a_state_of_other_data_is_refused(prompts, seed, names):
    stream = PromptStream(make_prompts(8), seed=1)
    stream.take(3)
    other = PromptStream(prompts, seed)
    with pytest.raises(DataError, match=f"the saved order belongs to {names}"):
        other.restore(stream.state())
    assert other.take(5) == PromptStream(prompts, seed).take(5), "a refused state changes nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"position": 9},
        {"position": -1},
        {"epoch": -1},
        {"epoch": None},
        {"position": "3"},
        {"epoch": True},
        {"size": 9},
        None,
    ],
)
def test_a_damaged_state_is_refused(change):
    stream = PromptStream(make_prompts(8), seed=1)
    with pytest.raises(DataError, match="data: the saved order "):
        stream.restore({} if change is None else {**stream.state(), **change})


# Real rows


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs the rows of GSM8K in {GSM8K}")
def test_gsm8k_is_checked_in_seconds():
    tokenizer = make_tokenizer(CHAT)
    config = configure({"source": f"{GSM8K}/{{split}}.jsonl"}, {"prompts": 2000}, max_length=2048, max_tokens=512)
    began = time.monotonic()
    train, held_out = train_prompts(config, tokenizer), eval_prompts(config, tokenizer)
    assert time.monotonic() - began < 30
    assert (len(train.prompts), len(held_out.prompts)) == (7473, 1319)
    assert (train.skipped, held_out.skipped) == (0, 0)
    assert train.prompts[0].question.startswith("Natalia sold clips") and train.prompts[0].answer.endswith("#### 72")
    assert tokenizer.decode(train.prompts[0].token_ids).startswith("<user>Natalia sold clips")
    assert not {prompt.question for prompt in train.prompts} & {prompt.question for prompt in held_out.prompts}


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs the rows of GSM8K in {GSM8K}")
def test_a_short_context_names_the_rows_of_gsm8k_that_do_not_fit(tokenizer):
    config = configure({"source": f"{GSM8K}/train.jsonl"}, max_length=512, max_tokens=64)
    *shown, last = failure(config, tokenizer).splitlines()
    lengths = [len(json.loads(line)["question"].encode()) + 1 for line in (GSM8K / "train.jsonl").open("rb")]
    too_long = [number for number, length in enumerate(lengths, start=1) if length > 512 - 64]
    assert [line.split(": ")[0] for line in shown] == [f"{GSM8K}/train.jsonl:{number}" for number in too_long[:5]]
    assert last.startswith(f"{len(too_long)} of 7473 rows")
