"""Data: what is refused and how it is named, what a prompt's tokens are, and the exactly-once stream."""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import arithmetic
from grpo.config import Config
from grpo.data import PromptStream, eval_prompts, load_tokenizer, train_prompts
from grpo.errors import ConfigError, DataError
from grpo.types import Prompt

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"
GOOD = {"question": "1+1?", "answer": "#### 2"}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template=None, bos=True):
    """Bytes as tokens: the id of a byte can be worked out by hand, and any text has one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<assistant>": 1} | {token: index + 2 for index, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", additional_special_tokens=["<assistant>"]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configure(data, held_out=None, max_length=128, max_tokens=32):
    return Config.model_validate(
        {
            "model": {"path": "models/tiny", "max_length": max_length},
            "rollout": {"max_tokens": max_tokens},
            "data": data,
            "eval": held_out or {},
        }
    )


def write_lines(path, *rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))


def failure(config, tokenizer, error=DataError):
    with pytest.raises(error) as caught:
        train_prompts(config, tokenizer)
    return str(caught.value)


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
    "half a pair": (b'{"question": "\\ud83d", "answer": "2"}\n', "question", "surrogate pair, \\ud83d"),
    "question twice": (b'{"question": "1", "question": "2", "answer": "2"}\n', "question", "twice"),
    "no question": ({"answer": "2"}, "question", "no such column among 'answer'"),
    "no answer": ({"question": "1+1?"}, "answer", "no such column among 'question'"),
    "other case": ({"Question": "1+1?", "answer": "2"}, "question", "'Question'"),
    "null question": ({"question": None, "answer": "2"}, "question", "null"),
    "null answer": ({"question": "1+1?", "answer": None}, "answer", "null"),
    "number answer": ({"question": "1+1?", "answer": 2}, "answer", "int 2"),
    "float answer": (b'{"question": "1+1?", "answer": NaN}\n', "answer", "float nan"),
    "true answer": ({"question": "1+1?", "answer": True}, "answer", "bool True"),
    "list question": ({"question": ["1+1?"], "answer": "2"}, "question", "list"),
    "object answer": ({"question": "1+1?", "answer": {"value": "2"}}, "answer", "dict"),
    "empty question": ({"question": "", "answer": "2"}, "question", "is empty"),
    "blank question": ({"question": " \t\n", "answer": "2"}, "question", "is empty"),
    "blank answer": ({"question": "1+1?", "answer": "\u3000"}, "answer", "is empty"),
    "too long": ({"question": "x" * 96, "answer": "2"}, "question", "97 tokens"),
    "huge": ({"question": "x" * 3_000_000, "answer": "2"}, "question", "3000001 tokens"),
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
@settings(deadline=None)
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
    write_lines(in_tmp / "rows.jsonl", GOOD, *[{"question": "?", "answer": number} for number in range(7)])
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


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_empty_file_is_refused(content, name, in_tmp, tokenizer):
    (in_tmp / name).write_bytes(content)
    assert failure(configure({"source": name}), tokenizer).startswith(f"{name}: has no rows; ")


def test_a_missing_file_is_named_with_its_key(in_tmp, tokenizer):
    message = failure(configure({"source": "data/none.jsonl"}), tokenizer)
    assert message.startswith("data/none.jsonl: there is no such file") and "data.source" in message


def test_a_folder_or_another_kind_of_file_is_no_source(in_tmp, tokenizer):
    (in_tmp / "folder.jsonl").mkdir()
    assert failure(configure({"source": "folder.jsonl"}), tokenizer).startswith("folder.jsonl: cannot be read (Is")
    (in_tmp / "rows.csv").write_text("question,answer\n")
    assert "rows.csv: must be one of .jsonl, .json, .parquet" in failure(configure({"source": "rows.csv"}), tokenizer)


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
        (b"\xff\xfe[", "not UTF-8 (byte 0xff at position 1)"),
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


def test_a_number_column_of_parquet_is_no_answer(in_tmp, tokenizer):
    write_table(in_tmp / "rows.parquet", question=["1+1?"], answer=[2])
    assert failure(configure({"source": "rows.parquet"}), tokenizer).startswith("rows.parquet:1: answer: must be text")


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
    assert failure(configure({"source": "set"}), tokenizer).startswith("set/train:2: answer: must be text, found null")
    missing = failure(configure({"source": "set", "split": "none"}), tokenizer)
    assert "cannot load set/none" in missing and 'Unknown split "none"' in missing and "data.source" in missing
    no_column = failure(configure({"source": "set", "answer_column": "solution"}), tokenizer)
    assert no_column.startswith("set/train: solution: there is no such column among 'question', 'answer'")


def test_a_hub_that_cannot_be_reached_says_how_to_go_on(tokenizer, monkeypatch):
    import datasets

    asked = []

    def unreachable(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = failure(configure({"source": "openai/gsm8k", "subset": "main"}), tokenizer)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]
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

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    eval_prompts(configure({"source": "a/b", "subset": "main"}), tokenizer)
    eval_prompts(configure({"source": "a/b", "subset": "main"}, {"source": "c/d"}), tokenizer)
    eval_prompts(configure({"source": "a/b"}, {"source": "c/d", "subset": "x", "split": "dev"}), tokenizer)
    assert asked == [("a/b", "main", "test"), ("c/d", None, "test"), ("c/d", "x", "dev")]


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


# Prompts


def text_of(prompt, tokenizer):
    return tokenizer.decode(prompt.token_ids)


def test_without_a_chat_template_the_format_is_the_prompt(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", {"question": "{a} {} {question} {{b}} %s \\1", "answer": "2"})
    config = configure({"source": "rows.jsonl", "prompt_format": "{question} {x}?\nA:"})
    (prompt,) = train_prompts(config, tokenizer).prompts
    assert text_of(prompt, tokenizer) == "<s>{a} {} {question} {{b}} %s \\1 {x}?\nA:"
    assert prompt.answer == "2"


def test_the_chat_template_writes_the_whole_prompt(in_tmp):
    tokenizer = make_tokenizer(CHAT)
    write_lines(in_tmp / "rows.jsonl", {"question": "1+1? {x}", "answer": "2"})
    config = configure({"source": "rows.jsonl", "prompt_format": "Q: {question}", "system_prompt": "Be exact."})
    (prompt,) = train_prompts(config, tokenizer).prompts
    assert text_of(prompt, tokenizer) == "<system>Be exact.\n<user>Q: 1+1? {x}\n<assistant>"
    assert prompt.token_ids[-1] == 1 and 0 not in prompt.token_ids, "special tokens are those of the template"
    (bare,) = train_prompts(configure({"source": "rows.jsonl"}), tokenizer).prompts
    assert text_of(bare, tokenizer) == "<user>1+1? {x}\n<assistant>"


def test_a_template_that_refuses_a_system_message_says_what_to_do(in_tmp):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    write_lines(in_tmp / "rows.jsonl", GOOD)
    config = configure({"source": "rows.jsonl", "system_prompt": "Be exact."})
    assert "System role not supported" in failure(config, make_tokenizer(refuses), ConfigError)


def test_a_prompt_without_tokens_is_refused(in_tmp):
    write_lines(in_tmp / "rows.jsonl", GOOD)
    assert "rows.jsonl:1: question: its prompt has no tokens" in failure(
        configure({"source": "rows.jsonl"}), make_tokenizer("{# nothing #}")
    )


def test_rows_are_tokenised_once_and_in_batches(in_tmp, monkeypatch):
    tokenizer = make_tokenizer()
    write_lines(in_tmp / "rows.jsonl", *[{"question": f"{number}?", "answer": "2"} for number in range(1500)])
    calls = []
    encode = type(tokenizer)._encode_plus

    def counted(self, text, *args, **kwargs):
        calls.append(len(text))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted)
    prompts = train_prompts(configure({"source": "rows.jsonl"}), tokenizer).prompts
    assert calls == [1024, 476]
    assert [text_of(prompts[index], tokenizer) for index in (0, 1023, 1024, 1499)] == [
        f"<s>{number}?" for number in (0, 1023, 1024, 1499)
    ]


def test_a_format_without_the_question_is_refused():
    with pytest.raises(ValueError, match=r"write \{question\} where it shall stand"):
        configure({"prompt_format": "Answer: {Question}"})


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
        source_id([{"question": "1+1?#### 2", "answer": "x"}, rows[1]]),
        source_id([{"question": "1+1?", "answer": "#### 2x"}, rows[1]]),
        source_id(rows, prompt_format="{question} "),
        source_id(rows, system_prompt="Be exact."),
        source_id(rows, make_tokenizer(CHAT)),
        source_id(rows, make_tokenizer(CHAT + " ")),
    ]
    assert len(set(ids)) == len(ids)
    assert source_id([{**row, "other": "column"} for row in rows]) == ids[0]


# Tokenizer


def test_a_tokenizer_is_loaded_from_the_model_folder(in_tmp):
    make_tokenizer(CHAT).save_pretrained("models/tiny")
    tokenizer = load_tokenizer(configure({}))
    assert tokenizer("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]
    assert tokenizer.chat_template == CHAT


def test_a_model_without_a_tokenizer_is_refused(in_tmp):
    with pytest.raises(ConfigError, match="model.path: no tokenizer can be loaded from models/tiny"):
        (in_tmp / "models/tiny").mkdir(parents=True)
        load_tokenizer(configure({}))
    (in_tmp / "models/tiny/tokenizer.json").write_text('{"model": {"type": "nonsense"}}')
    (in_tmp / "models/tiny/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="model.path: no tokenizer can be loaded from models/tiny"):
        load_tokenizer(configure({}))


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "runs/model/final", "models/none"])
def test_a_missing_model_folder_is_no_search_on_the_hub(path, in_tmp):
    (in_tmp / "models").mkdir()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"model.path: there is no folder {path} in "):
        load_tokenizer(Config.model_validate({"model": {"path": path}}))
    assert time.monotonic() - began < 1


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
@settings(deadline=None)
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
    import random

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
