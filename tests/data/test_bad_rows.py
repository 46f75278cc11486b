"""Rows and files that are wrong, in each format, at each place: named by file, row and field, or counted."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from grpo.data.prompts import train_prompts
from grpo.errors import DataError
from tests.data_helpers import configure

GOOD = [{"question": f"{n}+1?", "answer": f"so\n#### {n + 1}"} for n in range(6)]
PLACES = {"first": 0, "middle": 3, "last": 6}
MEGABYTES_10 = "x" * 10_000_000


def row(**changes):
    """A good row with changes; `...` leaves a key out."""
    changed = {"question": "1+1?", "answer": "#### 2"} | changes
    return {key: value for key, value in changed.items() if value is not ...}


# name -> (the row, the field that must be named). Every one can stand in every format.
BAD_ROWS = {
    "question null": (row(question=None), "question"),
    "question number": (row(question=5), "question"),
    "question float": (row(question=1.5), "question"),
    "question bool": (row(question=True), "question"),
    "question list": (row(question=["1+1?"]), "question"),
    "question object": (row(question={"text": "1+1?"}), "question"),
    "question empty": (row(question=""), "question"),
    "question spaces": (row(question=" \t\r\n\u00a0\u2003"), "question"),
    "question missing": (row(question=...), "question"),
    "question misspelt": (row(question=..., qestion="1+1?"), "question"),
    "question capital": (row(question=..., Question="1+1?"), "question"),
    "question padded name": (row(question=..., **{"question ": "1+1?"}), "question"),
    "question name with BOM": (row(question=..., **{"\ufeffquestion": "1+1?"}), "question"),
    "question too long": (row(question="x" * 5000), "question"),
    "question of 10 MB": (row(question=MEGABYTES_10), "question"),
    "question null character": (row(question="1\0+1?"), "question"),
    "answer null": (row(answer=None), "answer"),
    "answer of 80 digits as a number": (row(answer=10**80), "answer"),
    "answer of 1e300": (row(answer=1e300), "answer"),
    "answer bool": (row(answer=False), "answer"),
    "answer of several": (row(answer=["2", "3"]), "answer"),
    "answer of none": (row(answer=[]), "answer"),
    "question of parts": (row(question=[{"type": "text", "text": "1+1?"}]), "question"),
    "messages without roles": (row(question=[{"from": "human", "value": "1+1?"}]), "question"),
    "messages that end with the assistant": (
        row(question=[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]),
        "question",
    ),
    "messages with a picture": (
        row(question=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        "question",
    ),
    "messages of a strange role": (row(question=[{"role": "robot", "content": "1+1?"}]), "question"),
    "messages with a late system": (
        row(question=[{"role": "user", "content": "?"}, {"role": "system", "content": "!"}]),
        "question",
    ),
    "messages of nobody": (row(question=[]), "question"),
    "message that is blank": (row(question=[{"role": "user", "content": " "}]), "question"),
    "answer object": (row(answer={"value": 2}), "answer"),
    "answer empty": (row(answer=""), "answer"),
    "answer blank": (row(answer="\n\n"), "answer"),
    "answer missing": (row(answer=...), "answer"),
    "answer misspelt": (row(answer=..., anwser="2"), "answer"),
    "answer in words": (row(answer="two"), "answer"),
    "answer after marker empty": (row(answer="1+1=2\n####"), "answer"),
    "answer of two numbers": (row(answer="#### 2 or 3"), "answer"),
    "answer a fraction": (row(answer="#### 1/2"), "answer"),
    "answer with exponent": (row(answer="#### 1e5"), "answer"),
    "answer not a number": (row(answer="#### NaN"), "answer"),
    "answer infinite": (row(answer="#### inf"), "answer"),
    "answer of 10 MB": (row(answer=MEGABYTES_10), "answer"),
    "answer of more than a number": (row(answer="#### 2\\pi"), "answer"),
    "answer null character": (row(answer="#### 2\0"), "answer"),
    "answer that steers": (row(answer="\x1b[31m\u202e\r\n"), "answer"),
    "wrapped": ({"data": row()}, "question"),
    "empty object": ({}, "question"),
}
# What only the text of a JSON line can be, with the field that is named.
BAD_LINES = {
    "broken": (b'{"question": "1+1?", "answer": ', "row"),
    "not JSON": (b"question,answer", "row"),
    "single quotes": (b"{'question': '1+1?', 'answer': '2'}", "row"),
    "no quotes": (b"{question: 1, answer: 2}", "row"),
    "trailing comma": (b'{"question": "1+1?", "answer": "2",}', "row"),
    "python": (b'{"question": "1+1?", "answer": None}', "row"),
    "comment": (b'// {"question": "1+1?", "answer": "2"}', "row"),
    "two objects": (b'{"question": "1+1?"} {"answer": "2"}', "row"),
    "number": (b"5", "row"),
    "text": (b'"1+1?"', "row"),
    "null": (b"null", "row"),
    "true": (b"true", "row"),
    "list": (b'["1+1?", "2"]', "row"),
    "NaN": (b"NaN", "row"),
    "value NaN": (b'{"question": NaN, "answer": "2"}', "question"),
    "value Infinity": (b'{"question": "1+1?", "answer": -Infinity}', "answer"),
    "digits": (b'{"question": "1+1?", "answer": ' + b"9" * 5000 + b"}", "row"),
    "exponent": (b'{"question": "1+1?", "answer": 1e999999}', "answer"),
    "deep": (b"[" * 100_000, "row"),
    "deep object": (b'{"a":' * 100_000, "row"),
    "deep inside": (b'{"question": "1+1?", "answer": ' + b"[" * 500 + b"]" * 500 + b"}", "answer"),
    "control character": (b'{"question": "1+\x011?", "answer": "2"}', "row"),
    "null byte": (b'{"question": "1\x00+1?", "answer": "2"}', "row"),
    "null bytes": (b"\x00" * 100, "row"),
    "bad escape": (b'{"question": "\\x", "answer": "2"}', "row"),
    "cut escape": (b'{"question": "\\u12", "answer": "2"}', "row"),
    "Latin-1": ('{"question": "\u00e9?", "answer": "2"}'.encode("latin-1"), "question"),
    "bad UTF-8": (b'{"question": "\xff", "answer": "2"}', "question"),
    "overlong UTF-8": (b'{"question": "1+1?", "answer": "\xc0\x80 2"}', "answer"),
    "cut UTF-8": (b'{"question": "1+1?", "answer": "2 \xe2\x82"}', "answer"),
    "encoded surrogate": (b'{"question": "1+1?", "answer": "2 \xed\xa0\x80"}', "answer"),
    "lone surrogate": (b'{"question": "1+1?", "answer": "2 \\ud83d"}', "answer"),
    "swapped surrogates": (b'{"question": "\\ude00\\ud83d", "answer": "2"}', "question"),
    "UTF-16": ('{"question": "1+1?", "answer": "2"}'.encode("utf-16-le"), "row"),
    "second BOM": (b'\xef\xbb\xbf\xef\xbb\xbf{"question": "1+1?", "answer": "2"}', "row"),
    "gzip": (b" " + gzip.compress(b"{}").replace(b"\n", b""), "row"),
    "twice": (b'{"question": "1+1?", "question": "2+2?", "answer": "2"}', "question"),
    "twice inside": (b'{"question": "1+1?", "answer": "2", "more": {"a": 1, "a": 2}}', "a"),
    "bad key": (b'{"question": "1+1?", "answer": "2", "\\u001b[31m": "\xff"}', "\\x1b[31m..."),
}


def write(path, rows):
    """Rows as a file of the suffix's format; bytes are put in as they are."""
    texts = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in rows]
    if path.suffix == ".jsonl":
        path.write_bytes(b"".join(text + b"\n" for text in texts))
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",\n".join(texts) + b"]")
    return path


def write_parquet(path, rows):
    """Parquet has one type a column: a value of another type changes the column's, for every row."""
    names = list(dict.fromkeys(name for entry in rows for name in entry))
    columns = {}
    for name in names:
        cells = [entry.get(name) for entry in rows]
        kinds = {type(cell) for cell in cells if cell is not None}
        columns[name] = pyarrow.array(cells if len(kinds) == 1 else [cell and str(cell) for cell in cells])
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def outcome(source, tokenizer, on_bad_row="fail"):
    """The message of the DataError, or how many prompts there are and how many rows were skipped."""
    try:
        loaded = train_prompts(configure({"source": str(source), "on_bad_row": on_bad_row}), tokenizer)
    except DataError as error:
        return well_formed(str(error))
    return len(loaded.prompts), loaded.skipped


def well_formed(message):
    lines = message.split("\n")
    assert len(lines) <= 7 and "Traceback" not in message
    for line in lines:
        assert line.isprintable() and 10 < len(line) < 900, ascii(line[:1500])
    return message


def mixed(bad, place):
    return [*GOOD[: PLACES[place]], bad, *GOOD[PLACES[place] :]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_counted(name, place, suffix, in_tmp, tokenizer):
    bad, field = BAD_ROWS[name]
    path = write(in_tmp / f"rows{suffix}", mixed(bad, place))
    message = outcome(path, tokenizer)
    assert message.startswith(f"{path}:{PLACES[place] + 1}: {field}: "), message[:300]
    assert message.split("\n")[1].startswith(f"1 of 7 rows of {path} cannot be used; ")
    assert outcome(path, tokenizer, "skip") == (6, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_counted(name, place, in_tmp, tokenizer):
    bad, field = BAD_LINES[name]
    path = write(in_tmp / "rows.jsonl", mixed(bad, place))
    message = outcome(path, tokenizer)
    assert message.startswith(f"{path}:{PLACES[place] + 1}: {field}: "), message[:300]
    assert outcome(path, tokenizer, "skip") == (6, 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_text_in_an_array_is_named(name, place, in_tmp, tokenizer):
    """What breaks the array breaks the file; what is only a bad item is numbered."""
    bad, field = BAD_LINES[name]
    path = write(in_tmp / "rows.json", mixed(bad, place))
    message = outcome(path, tokenizer)
    whole = re.match(rf"{re.escape(str(path))}: (is not valid JSON|is not UTF-8|must hold an array)", message)
    assert whole or message.startswith(f"{path}:{PLACES[place] + 1}: {field}: "), message[:300]
    after = outcome(path, tokenizer, "skip")
    assert after == ((6, 1) if not whole else message)


IN_PARQUET = [
    name
    for name, (bad, _) in BAD_ROWS.items()
    if set(bad) >= {"question", "answer"} and all(cell is None or isinstance(cell, str) for cell in bad.values())
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", IN_PARQUET)
def test_a_bad_cell_of_parquet_is_named_or_counted(name, place, in_tmp, tokenizer):
    bad, field = BAD_ROWS[name]
    path = in_tmp / "rows.parquet"
    write_parquet(path, mixed(bad, place))
    message = outcome(path, tokenizer)
    assert message.startswith(f"{path}:{PLACES[place] + 1}: {field}: "), message[:300]
    assert outcome(path, tokenizer, "skip") == (6, 1)


TEXTS = [good["answer"] for good in GOOD]
COLUMNS = {
    "NaN": pyarrow.array([float("nan")] * 6),
    "bool": pyarrow.array([True] * 6),
    "null": pyarrow.nulls(6),
    "list": pyarrow.array([["2", "3"]] * 6),
    "struct": pyarrow.array([{"a": "2"}] * 6),
    "binary": pyarrow.array([b"2"] * 6),
    "time": pyarrow.array([1] * 6).cast(pyarrow.timestamp("us")),
    "bad UTF-8": pyarrow.Array.from_buffers(
        pyarrow.large_string(), 6, pyarrow.array([b"\xff\xfe"] * 6, pyarrow.large_binary()).buffers()
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_another_type_is_named_for_each_row(name, in_tmp, tokenizer):
    table = pyarrow.table({"question": TEXTS, "answer": COLUMNS[name]})
    pyarrow.parquet.write_table(table, in_tmp / "rows.parquet")
    for mode in ("fail", "skip"):
        message = outcome("rows.parquet", tokenizer, mode)
        assert message.startswith("rows.parquet:1: answer: ") and "6 of 6 rows of rows.parquet" in message


@pytest.mark.parametrize("found", ["answr", "Answer", "answers", "solution"])
def test_a_missing_column_of_parquet_is_named_with_those_there_are(found, in_tmp, tokenizer):
    pyarrow.parquet.write_table(pyarrow.table({"question": TEXTS, found: TEXTS}), in_tmp / "rows.parquet")
    message = outcome("rows.parquet", tokenizer)
    assert message.startswith("rows.parquet: answer: there is no such column among 'question', '" + found)
    assert (f"did you mean '{found}'" in message) == (found != "solution")


def test_a_table_of_many_columns_is_not_all_listed(in_tmp, tokenizer):
    table = pyarrow.table({f"column{n}": TEXTS for n in range(500)} | {"\x1b[31m" + "n" * 10_000: TEXTS})
    pyarrow.parquet.write_table(table, in_tmp / "rows.parquet")
    assert "'column11', ...; correct it or set data.question_column" in outcome("rows.parquet", tokenizer)


def parquet_bytes(folder):
    pyarrow.parquet.write_table(pyarrow.table({"question": TEXTS, "answer": TEXTS}), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def device(path):
    path.symlink_to("/dev/zero")


FILES = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_bytes(b"\n \r\n\t\n"),
    "BOM only": lambda path: path.write_bytes(b"\xef\xbb\xbf"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "device": device,
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),  # root may open everything else
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "gzip": lambda path: path.write_bytes(gzip.compress(json.dumps(GOOD).encode())),
    "UTF-16": lambda path: path.write_bytes(json.dumps(GOOD).encode("utf-16")),
    "parquet magic": lambda path: path.write_bytes(b"PAR1" * 20),
    "parquet cut": lambda path: path.write_bytes(parquet_bytes(path.parent)[:-20]),
    "parquet head cut": lambda path: path.write_bytes(parquet_bytes(path.parent)[20:]),
    "HTML": lambda path: path.write_bytes(b"<!doctype html>\n<title>404</title>"),
    "LFS pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".JSONL"])
@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, suffix, in_tmp, tokenizer):
    FILES[name](in_tmp / f"rows{suffix}")
    for mode in ("fail", "skip"):
        message = outcome(f"rows{suffix}", tokenizer, mode)
        assert isinstance(message, str) and message.startswith(f"rows{suffix}:"), message


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.txt", "rows", "rows.gz", "rows.pkl", "rows.jsonl.rar"])
def test_another_kind_of_file_is_named(name, in_tmp, tokenizer):
    (in_tmp / name).write_bytes(json.dumps(GOOD[0]).encode())
    assert "must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow" in outcome(name, tokenizer)


def test_any_damage_to_a_parquet_file_is_survived(in_tmp, tokenizer):
    whole = parquet_bytes(in_tmp)
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (in_tmp / "rows.parquet").write_bytes(damaged)
        outcome("rows.parquet", tokenizer)


ODD = {
    "CRLF": b"".join(json.dumps(good).encode() + b"\r\n" for good in GOOD),
    "no last line end": b"\n".join(json.dumps(good).encode() for good in GOOD),
    "blank lines": b"\n\n".join(json.dumps(good).encode() for good in GOOD) + b"\n \n\t\n",
    "BOM": b"\xef\xbb\xbf" + b"".join(json.dumps(good).encode() + b"\n" for good in GOOD),
    "more columns": b"".join(json.dumps(good | {"id": 5, "tags": [1]}).encode() + b"\n" for good in GOOD),
    "other order": b"".join(
        json.dumps(dict(sorted(good.items(), reverse=n % 2 == 0)) | {f"k{n}": n}).encode() + b"\n"
        for n, good in enumerate(GOOD)
    ),
    "other scripts": b"".join(
        json.dumps(good | {"question": "\u0661+1? \U0001f600 \u202e \x1b[31m"}, ensure_ascii=False).encode() + b"\n"
        for good in GOOD
    ),
    "escaped pair": b"".join(json.dumps(good | {"question": "\U0001f600 1+1?"}).encode() + b"\n" for good in GOOD),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_but_right_is_used(name, in_tmp, tokenizer):
    (in_tmp / "rows.jsonl").write_bytes(ODD[name])
    assert outcome("rows.jsonl", tokenizer) == (6, 0)


def test_an_answer_for_a_reward_of_ones_own_needs_no_number(in_tmp, tokenizer):
    write(in_tmp / "rows.jsonl", [row(answer="Paris")])
    config = configure({"source": "rows.jsonl"}).model_copy(deep=True)
    own = config.model_validate(config.model_dump() | {"rewards": [{"function": "my:own"}]})
    assert len(train_prompts(own, tokenizer).prompts) == 1


def test_there_are_enough_kinds():
    kinds = len(BAD_ROWS) + len(BAD_LINES) + len(COLUMNS) + len(FILES)
    cases = len(PLACES) * (2 * len(BAD_ROWS) + 2 * len(BAD_LINES) + len(IN_PARQUET)) + len(COLUMNS) + 4 * len(FILES)
    print(f"\n{kinds} kinds of malformed rows and files, {cases} cases")
    assert kinds > 80 and cases > 500
