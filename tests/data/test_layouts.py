"""The layouts of the field: the same rows in every one give the same prompts, and advice works for the format."""

import bz2
import csv
import gzip
import io
import json
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.data.columns import MISSING, head_of, value_at
from grpo.data.prompts import train_prompts
from grpo.data.rows import number_text
from grpo.errors import DataError
from tests.data_helpers import CHAT, configure, failure, make_tokenizer

ROWS = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(5)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def separated(rows, **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def ipc(path, rows, stream):
    table = pyarrow.Table.from_pylist(rows)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table)


LAYOUTS = {
    "rows.jsonl": lambda path: path.write_bytes(TEXT),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(TEXT)),
    "ROWS.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:])),
    "rows.jsonl.zst": lambda path: path.write_bytes(pyarrow.compress(TEXT, codec="zstd", asbytes=True)),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(TEXT)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": lambda path: path.write_bytes(separated(ROWS)),
    "windows.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + separated(ROWS, lineterminator="\r\n")),
    "quoted.csv": lambda path: path.write_bytes(separated(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n")),
    "rows.csv.zst": lambda path: path.write_bytes(pyarrow.compress(separated(ROWS), codec="zstd", asbytes=True)),
    "rows.tsv": lambda path: path.write_bytes(separated(ROWS, delimiter="\t")),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "file.arrow": lambda path: ipc(path, ROWS, stream=False),
    "stream.arrow": lambda path: ipc(path, ROWS, stream=True),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved_sets": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_prompts(name, in_tmp, tokenizer):
    LAYOUTS[name](in_tmp / name)
    found = train_prompts(configure({"source": f"./{name}"}), tokenizer).prompts
    assert [(prompt.question, prompt.answer) for prompt in found] == [(r["question"], r["answer"]) for r in ROWS]


# name -> (question column, answer column, further keys, row). The question is "1+1?", the answer 2.
SAY = [{"role": "user", "content": "1+1?"}]
COLUMNS = {
    "verl": (
        "prompt",
        "reward_model.ground_truth",
        {},
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"content": "1+1?", "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"answer": "1+1 is 2\n#### 2", "index": 0, "split": "train"},
        },
    ),
    "verl's index": ("prompt", "extra_info.index", {}, {"prompt": SAY, "extra_info": {"index": 2}}),
    "TRL": ("prompt", "completion", {}, {"prompt": SAY, "completion": [{"role": "assistant", "content": "2"}]}),
    "TRL, text": ("prompt", "solution", {}, {"prompt": "1+1?", "solution": "2"}),
    "OpenAI": ("messages", "messages", {}, {"messages": [*SAY, {"role": "assistant", "content": "2"}]}),
    "OpenAI, graded": ("messages", "reference_answer", {}, {"messages": SAY, "reference_answer": "2"}),
    "parts": ("p", "a", {}, {"p": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "a": "2"}),
    "Alpaca": (
        "instruction",
        "output",
        {"input_column": "input"},
        {"instruction": "1+1?", "input": "", "output": "2"},
    ),
    "a dot in the name": ("q.text", "a", {}, {"q.text": "1+1?", "q": {"text": "no"}, "a": "2"}),
    "deep": ("a.b.c", "a.d", {}, {"a": {"b": {"c": "1+1?"}, "d": "2"}}),
    "in a list": ("p.1", "a.0.text", {}, {"p": ["no", "1+1?"], "a": [{"text": "2"}, {"text": "3"}]}),
    "one answer in a list": ("q", "a", {}, {"q": "1+1?", "a": ["2"]}),
    "int": ("q", "a", {}, {"q": "1+1?", "a": 2}),
    "float": ("q", "a", {}, {"q": "1+1?", "a": 2.0}),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_columns_of_the_field_are_read(name, kind, in_tmp):
    question, answer, more, row = COLUMNS[name]
    if kind == "jsonl":
        (in_tmp / "x.jsonl").write_text(json.dumps(row))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), in_tmp / "x.parquet")
    else:
        datasets.Dataset.from_list([row]).save_to_disk(in_tmp / "x.saved")
    config = configure({"source": f"./x.{kind}", "question_column": question, "answer_column": answer, **more})
    tokenizer = make_tokenizer(CHAT)
    (prompt,) = train_prompts(config, tokenizer).prompts
    assert (prompt.question, prompt.answer) == ("1+1?", "2")
    assert tokenizer.decode(prompt.token_ids) == "<user>1+1?\n<assistant>"


def test_a_conversation_keeps_its_turns(in_tmp):
    turns = [{"role": "system", "content": "Add."}, *SAY, {"role": "assistant", "content": "2"}]
    row = {"messages": [*turns, {"role": "user", "content": "And 2+2?"}], "answer": 4}
    (in_tmp / "x.jsonl").write_text(json.dumps(row))
    data = {"source": "x.jsonl", "question_column": "messages", "prompt_format": "Q: {question}"}
    tokenizer = make_tokenizer(CHAT)
    (prompt,) = train_prompts(configure(data | {"system_prompt": "Never seen."}), tokenizer).prompts
    seen = "<system>Add.\n<user>1+1?\n<assistant>2\n<user>Q: And 2+2?\n<assistant>"
    assert tokenizer.decode(prompt.token_ids) == seen and prompt.question == "And 2+2?"


def test_an_input_stands_below_its_instruction(in_tmp, tokenizer):
    rows = [{"instruction": "Add.", "input": "1 and 1", "output": "2"}, {"instruction": "1+2?", "output": "3"}]
    (in_tmp / "x.json").write_text(json.dumps(rows))
    columns = {"question_column": "instruction", "answer_column": "output", "input_column": "input"}
    prompts = train_prompts(configure({"source": "x.json", **columns}), tokenizer).prompts
    assert [prompt.question for prompt in prompts] == ["Add.\n\n1 and 1", "1+2?"]


def test_a_column_that_is_not_there_is_named_with_what_lies_below(in_tmp, tokenizer):
    (in_tmp / "x.jsonl").write_text(json.dumps({"question": "1+1?", "reward_model": {"ground_truth": "2"}}))
    message = failure(configure({"source": "x.jsonl", "answer_column": "reward_model.groundtruth"}), tokenizer)
    assert "x.jsonl:1: reward_model.groundtruth: there is no such column" in message
    assert "did you mean 'reward_model.ground_truth'" in message and "data.answer_column" in message


NUMBERS = [
    (42.0, "42"),
    (1e3, "1000"),
    (0.1, "0.1"),
    (-0.0, "0"),
    (1e22, "10000000000000000000000"),
    (2.5e-7, "0.00000025"),
    (7, "7"),
    (-3, "-3"),
    (10**30, "1" + "0" * 30),
    (Decimal("2.00"), "2"),
    (Decimal("1E+2"), "100"),
    (float("nan"), ""),
    (float("inf"), ""),
    (10**80, ""),
    (1e-300, ""),
]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_a_number_is_written_without_noise(number, text):
    assert number_text(number) == text


@given(st.floats(min_value=-1e50, max_value=1e50).filter(lambda x: x == 0 or abs(x) > 1e-50))
def test_the_text_of_a_number_means_that_number(number):
    text = number_text(number)
    assert float(text) == number and "e" not in text.lower() and not text.endswith(".")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pyarrow.array([0.1], pyarrow.float32()), "0.1"),
        (pyarrow.array([2.5]).cast(pyarrow.float16()), "2.5"),
        (pyarrow.array([Decimal("12.50")]), "12.5"),
        (pyarrow.array([7], pyarrow.uint8()), "7"),
    ],
)
def test_numbers_of_a_table_have_the_digits_of_their_type(column, text, in_tmp, tokenizer):
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1+1?"], "answer": column}), in_tmp / "x.parquet")
    (prompt,) = train_prompts(configure({"source": "x.parquet"}), tokenizer).prompts
    assert prompt.answer == text


def test_several_answers_are_json_for_a_reward_of_ones_own_alone(in_tmp, tokenizer):
    (in_tmp / "x.jsonl").write_text(json.dumps({"question": "1+1?", "answer": ["2", "zwei"]}))
    config = configure({"source": "x.jsonl"})
    assert "must be text or a number, found list" in failure(config, tokenizer)
    own = config.model_validate(config.model_dump() | {"rewards": [{"function": "my:own"}]})
    assert train_prompts(own, tokenizer).prompts[0].answer == '["2", "zwei"]'


def test_a_csv_keeps_its_texts(in_tmp, tokenizer):
    rows = [
        {"question": 'a "b", c\nd?', "answer": "007", "more": "x"},
        {"question": "e;f", "answer": " 1 ", "more": ""},
    ]
    (in_tmp / "x.csv").write_bytes(separated(rows))
    prompts = train_prompts(configure({"source": "x.csv"}), tokenizer).prompts
    assert [(prompt.question, prompt.answer) for prompt in prompts] == [('a "b", c\nd?', "007"), ("e;f", " 1 ")]


BAD_CSV = {
    "cells": (b'question,answer\n"1+1,\n2",2\n1+2?,3,4\n', "x.csv:4: row: has 3 cells, the first line 2"),
    "too few": (b"question,answer\n1+1?\n", "x.csv:2: row: has 1 cells"),
    "quote": (b'question,answer\n"a"b,2\n1+1?,2\n', "x.csv:2: row: cannot be read ("),
    "open quote": (b'question,answer\n1+1?,2\n"a,2\n', "x.csv:3: row: cannot be read ("),
    "empty cell": (b"question,answer\n1+1?,\n", "x.csv:2: answer: is empty"),
    "Latin-1": (b"question,answer\ncaf\xe9?,2\n", "x.csv:2: question: is not valid Unicode (byte 0xe9"),
    "UTF-16": (
        "question,answer\n1+1?,2\n".encode("utf-16"),
        "x.csv: is not UTF-8 (byte 0xff at position 1) but UTF-16",
    ),
    "no column": (b"question;answer\n1+1?;2\n", "x.csv: question: there is no such column among 'question;answer'"),
    "twice": (b"question,answer,answer\n1,2,3\n", "x.csv: has the column 'answer' twice"),
    "empty": (b"", "x.csv: has no rows"),
    "names alone": (b"question,answer\n", "x.csv: has no rows"),
    "a word": (b"question,answer\n1+1?,two\n", "x.csv:2: answer: the reward gsm8k compares numbers"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_what_is_wrong_in_a_csv_is_named_with_its_line(name, in_tmp, tokenizer):
    content, says = BAD_CSV[name]
    (in_tmp / "x.csv").write_bytes(content)
    message = failure(configure({"source": "x.csv"}), tokenizer)
    assert message.startswith(says) and "write it in quotes" not in message


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(TEXT * 99)[:-20],
    "no.jsonl.gz": TEXT,
    "cut.jsonl.zst": pyarrow.compress(TEXT * 99, codec="zstd", asbytes=True)[:-5],
    "no.csv.bz2": b"question,answer\n",
    "packed.jsonl": gzip.compress(TEXT),
    "packed.csv": pyarrow.compress(TEXT, codec="zstd", asbytes=True),
    "no.arrow": b"ARROW1 but not really",
    "empty.arrow": b"",
    "wide.jsonl": TEXT.decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence(name, in_tmp, tokenizer):
    (in_tmp / name).write_bytes(DAMAGED[name])
    message = failure(configure({"source": name}), tokenizer)
    assert message.startswith(f"{name}: ") and "; " in message and len(message.splitlines()) == 1, message


def test_a_folder_that_was_saved_and_is_damaged_is_named(in_tmp, tokenizer):
    datasets.Dataset.from_list(ROWS).save_to_disk(in_tmp / "saved")
    next((in_tmp / "saved").glob("*.arrow")).write_bytes(b"junk")
    assert failure(configure({"source": "saved"}), tokenizer).startswith("data.source: cannot load saved/train (")


def test_the_split_that_came_is_compared_with_the_one_that_was_asked_for(in_tmp, tokenizer):
    (in_tmp / "x.jsonl").write_bytes(TEXT)
    whole = datasets.load_dataset("json", data_files={"train": str(in_tmp / "x.jsonl")}, split="train")
    whole.save_to_disk(in_tmp / "saved")
    assert len(train_prompts(configure({"source": "saved"}), tokenizer).prompts) == 5
    message = failure(configure({"source": "saved", "split": "test"}), tokenizer)
    assert message.startswith("saved/test: is the split train, asked was test; correct data.split")


def test_the_rows_and_the_commit_that_came_are_compared(in_tmp, tokenizer, monkeypatch):
    (in_tmp / "x.jsonl").write_bytes(TEXT)
    whole = datasets.load_dataset("json", data_files={"train": str(in_tmp / "x.jsonl")}, split="train")
    config = configure({"source": "a/b", "revision": "a" * 40})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    assert len(train_prompts(config, tokenizer).prompts) == 5
    whole.info.download_checksums = {f"hf://datasets/a/b@{'b' * 40}/x.jsonl": {}}
    message = failure(config, tokenizer)
    assert message.startswith(f"a/b/train: came from commit {'b' * 40}") and "a" * 40 in message
    whole.info.download_checksums = {f"hf://datasets/a/b@{'a' * 40}/x.jsonl": {}}
    assert len(train_prompts(config, tokenizer).prompts) == 5
    whole.info.splits["train"].num_examples = 7
    assert "has 5 rows, but its description says 7" in failure(config, tokenizer)


@given(st.recursive(st.text(max_size=2), lambda inner: st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3)))
def test_any_path_finds_one_value_or_none(row):
    if isinstance(row, dict):
        for name, value in row.items():
            assert value_at(name, row) is value and head_of(name, row) == name
        assert value_at("zz.z", row) is MISSING and head_of("zz", row) is None


def test_null_below_a_column_is_null(in_tmp, tokenizer):
    table = pyarrow.table({"question": ["1+1?"], "a": pyarrow.array([None], pyarrow.struct([("b", pyarrow.string())]))})
    pyarrow.parquet.write_table(table, in_tmp / "x.parquet")
    message = failure(configure({"source": "x.parquet", "answer_column": "a.b"}), tokenizer)
    assert message.startswith("x.parquet:1: a.b: must be text or a number, found null; fill it in")


def test_text_that_is_no_unicode_below_a_column_is_named(in_tmp, tokenizer):
    text = pyarrow.array([b"2", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"question": ["1+1?", "2+2?"], "a": pyarrow.StructArray.from_arrays([text], ["b"])})
    pyarrow.parquet.write_table(table, in_tmp / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet:2: a: is not valid Unicode"):
        train_prompts(configure({"source": "x.parquet", "answer_column": "a.b"}), tokenizer)
