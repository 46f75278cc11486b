"""Sources: files, the datasets library and the built-in task give the same rows and name what they cannot read."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from grpo.data import arithmetic
from grpo.data.prompts import eval_prompts, train_prompts
from grpo.errors import ConfigError
from tests.data_helpers import GOOD, configure, failure, write_lines


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_empty_file_is_refused(content, name, in_tmp, tokenizer):
    (in_tmp / name).write_bytes(content)
    assert failure(configure({"source": name}), tokenizer).startswith(f"{name}: has no rows; ")


def test_a_missing_file_is_named_with_its_key(in_tmp, tokenizer):
    message = failure(configure({"source": "data/none.jsonl"}), tokenizer)
    assert message.startswith("data/none.jsonl: there is no such file") and "data.source" in message


@pytest.mark.parametrize("source", ["/nowhere/data", "./none", "some/more/data"])
def test_a_missing_folder_is_no_search_on_the_hub(source, in_tmp, tokenizer):
    message = failure(configure({"source": source}), tokenizer)
    assert message.startswith(f"{source}: there is no such folder in ") and "data.source" in message


def test_a_folder_or_another_kind_of_file_is_no_source(in_tmp, tokenizer):
    (in_tmp / "folder.jsonl").mkdir()
    message = failure(configure({"source": "folder.jsonl"}), tokenizer)
    assert message.startswith("folder.jsonl: must be a file, not a folder")
    (in_tmp / "rows.xml").write_text("<rows/>")
    message = failure(configure({"source": "rows.xml"}), tokenizer)
    assert message.startswith("rows.xml: must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow (texts also")


# JSON


def test_a_json_file_is_an_array(in_tmp, tokenizer):
    (in_tmp / "rows.json").write_text(json.dumps([GOOD, {"question": "2+2?", "answer": "4"}]))
    prompts = train_prompts(configure({"source": "rows.json"}), tokenizer).prompts
    assert [prompt.question for prompt in prompts] == ["1+1?", "2+2?"]


@pytest.mark.parametrize(
    "content, says",
    [
        (json.dumps(GOOD).encode(), "must hold an array, found dict"),
        (json.dumps(GOOD).encode() * 2, "not valid JSON"),
        (b'[{"question": "1"', "not valid JSON"),
        (b"[\xff\xfe", "not UTF-8 (byte 0xff at position 2)"),
    ],
)
def test_a_json_file_that_is_none_is_named(content, says, in_tmp, tokenizer):
    (in_tmp / "rows.json").write_bytes(content)
    message = failure(configure({"source": "rows.json"}), tokenizer)
    assert message.startswith("rows.json: ") and says in message and ".jsonl" in message


def test_a_bad_row_of_a_json_file_is_numbered_by_its_place(in_tmp, tokenizer):
    (in_tmp / "rows.json").write_bytes(b"[" + json.dumps(GOOD).encode() + b',\n\n{"question": "\xff", "answer": "2"}]')
    assert failure(configure({"source": "rows.json"}), tokenizer).startswith("rows.json:2: question: ")


# Parquet


def write_table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_gives_the_same_prompts_as_jsonl(kind, in_tmp, tokenizer):
    rows = [GOOD, {"question": "2+2=\u20ac?", "answer": "4"}]
    write_lines(in_tmp / "rows.jsonl", *rows)
    write_table(in_tmp / "rows.parquet", **{key: pyarrow.array([row[key] for row in rows]).cast(kind) for key in GOOD})
    first, second = (train_prompts(configure({"source": f"rows.{kind}"}), tokenizer) for kind in ("jsonl", "parquet"))
    assert first == second


def test_bad_cells_of_parquet_are_named(in_tmp, tokenizer):
    broken = pyarrow.array([b"1+1?", b"\xff", None, b"", b"ok"]).view(pyarrow.string())
    write_table(in_tmp / "rows.parquet", question=broken, answer=["2", "2", "2", "2", None])
    *shown, last = failure(configure({"source": "rows.parquet"}), tokenizer).splitlines()
    assert [line.split(": ")[:2] for line in shown] == [
        ["rows.parquet:2", "question"],
        ["rows.parquet:3", "question"],
        ["rows.parquet:4", "question"],
        ["rows.parquet:5", "answer"],
    ]
    assert "not valid Unicode (invalid start byte at byte 1)" in shown[0] and last.startswith("4 of 5 rows")


def test_advice_for_a_table_is_not_to_write_quotes(in_tmp, tokenizer):
    write_table(in_tmp / "rows.parquet", question=["1+1?"], answer=[True])
    message = failure(configure({"source": "rows.parquet"}), tokenizer)
    assert message.startswith("rows.parquet:1: answer: must be text or a number, found bool True; convert the column")
    assert "quotes" not in message


def test_a_missing_column_of_parquet_is_named(in_tmp, tokenizer):
    write_table(in_tmp / "rows.parquet", problem=["1+1?"], answer=["2"])
    message = failure(configure({"source": "rows.parquet"}), tokenizer)
    assert message.startswith("rows.parquet: question: there is no such column among 'problem', 'answer'")
    assert "data.question_column" in message


def test_two_columns_of_one_name_are_refused(in_tmp, tokenizer):
    table = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 3, names=["question", "question", "answer"])
    pyarrow.parquet.write_table(table, in_tmp / "rows.parquet")
    assert failure(configure({"source": "rows.parquet"}), tokenizer).startswith("rows.parquet: ")


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_damaged_parquet_file_is_named(keep, in_tmp, tokenizer):
    write_table(in_tmp / "rows.parquet", question=["1+1?"] * 500, answer=["2"] * 500)
    (in_tmp / "rows.parquet").write_bytes((in_tmp / "rows.parquet").read_bytes()[:keep])
    assert failure(configure({"source": "rows.parquet"}), tokenizer).startswith("rows.parquet: is not a whole Parquet")


def test_a_parquet_file_without_rows_is_refused(in_tmp, tokenizer):
    write_table(in_tmp / "rows.parquet", question=pyarrow.array([], "string"), answer=pyarrow.array([], "string"))
    assert failure(configure({"source": "rows.parquet"}), tokenizer).startswith("rows.parquet: has no rows; ")


# The datasets library


def test_a_folder_of_splits_goes_through_datasets(in_tmp, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")
    (in_tmp / "set").mkdir()
    write_lines(in_tmp / "set/train.jsonl", GOOD, {"question": "2+2?", "answer": None})
    write_lines(in_tmp / "set/test.jsonl", {"question": "3+3?", "answer": "6"})
    config = configure({"source": "set", "on_bad_row": "skip"})
    loaded = train_prompts(config, tokenizer)
    assert ([prompt.question for prompt in loaded.prompts], loaded.skipped) == (["1+1?"], 1)
    assert [prompt.question for prompt in eval_prompts(config, tokenizer).prompts] == ["3+3?"]
    message = failure(configure({"source": "set"}), tokenizer)
    assert message.startswith("set/train:2: answer: must be text or a number, found null; fill it in")
    missing = failure(configure({"source": "set", "split": "none"}), tokenizer)
    assert "cannot load set/none" in missing and 'Unknown split "none"' in missing and "data.source" in missing
    no_column = failure(configure({"source": "set", "answer_column": "solution"}), tokenizer)
    assert no_column.startswith("set/train: solution: there is no such column among 'question', 'answer'")


def test_a_folder_that_datasets_cannot_parse_says_why(in_tmp, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "cache")
    (in_tmp / "set").mkdir()
    write_lines(in_tmp / "set/train.jsonl", GOOD, b"{broken\n")
    message = failure(configure({"source": "set"}), tokenizer)
    assert message.startswith("data.source: cannot load set/train (JSON parse error: ")


def test_a_hub_that_cannot_be_reached_says_how_to_go_on(tokenizer, monkeypatch):
    import datasets

    asked = []

    def unreachable(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = failure(configure({"source": "openai/gsm8k", "subset": "main", "revision": "a" * 40}), tokenizer)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "a" * 40})]
    assert "openai/gsm8k/main/train" in message and "Couldn't reach" in message and "local file (.jsonl" in message


# The built-in task


def test_arithmetic_is_a_source(tokenizer):
    config = configure({"source": "arithmetic", "size": 30}, {"prompts": 10}, max_length=256)
    train, held_out = train_prompts(config, tokenizer).prompts, eval_prompts(config, tokenizer).prompts
    assert [prompt.question for prompt in train] == [row["question"] for row in arithmetic.rows("train", 30)]
    assert [prompt.answer for prompt in held_out] == [row["answer"] for row in arithmetic.rows("test", 10)]


def test_arithmetic_has_two_splits(tokenizer):
    message = failure(configure({"source": "arithmetic", "split": "dev"}), tokenizer, ConfigError)
    assert message.startswith("data.split: ") and "train and test" in message
