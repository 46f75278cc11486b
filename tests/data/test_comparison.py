"""Copies are counted and told; held-out prompts that are trained on are found by what they say, wherever they stand."""

import csv
import json
import os

import datasets
import pytest

from grpo.data.prompts import load_data, train_prompts
from grpo.data.rendering import Rendering
from grpo.errors import ConfigError, DataError
from tests.data_helpers import CHAT, configure, make_tokenizer, write_lines

ROWS = [{"question": f"What is {n}+1?", "answer": f"so\n#### {n + 1}"} for n in range(20)]


def notes(in_tmp, *rows, tokenizer=None, **changes):
    write_lines(in_tmp / "rows.jsonl", *rows)
    config = configure({"source": "rows.jsonl"})
    config = config.model_validate(config.model_dump() | changes)
    return train_prompts(config, tokenizer or make_tokenizer()).notes


def test_prompts_that_differ_are_no_copies(in_tmp):
    assert notes(in_tmp, *ROWS) == ()


def test_copies_are_counted(in_tmp):
    assert notes(in_tmp, *[ROWS[0]] * 100) == (
        "data: 99 of 100 prompts are copies of others (1 = 2, 1 = 3, 1 = 4, ...)",
    )


def test_what_differs_in_what_no_prompt_shows_is_a_copy(in_tmp):
    """Rows that the template strips, and working that leads to the same number."""
    trimming = make_tokenizer(CHAT.replace("m['content']", "m['content'] | trim"))
    other = {"question": " What is 0+1?\n", "answer": "thus\n#### 1.0"}
    (copies,) = notes(in_tmp, ROWS[0], other, ROWS[1], tokenizer=trimming)
    assert "1 of 3 prompts are copies of others (1 = 2)" in copies


def test_one_prompt_with_two_answers_is_told_louder(in_tmp):
    copies, conflict = notes(in_tmp, ROWS[0], ROWS[1], ROWS[0] | {"answer": "#### 7"})
    assert copies.startswith("data: 1 of 3 prompts are copies")
    assert conflict.startswith("WARNING: data: 1 prompts are the same as others with ANOTHER ANSWER (1 = 3)")
    own = {"rewards": [{"function": "my:own"}]}
    assert len(notes(in_tmp, ROWS[0], ROWS[0] | {"answer": "thus\n#### 1"}, **own)) == 2, "who reads all of the text"


def test_different_questions_with_one_prompt_are_refused(in_tmp):
    """Each question does stand in the prompt that all rows get."""
    template = "{% for m in messages %}1+1? 2+2?{% endfor %}"
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
    with pytest.raises(DataError, match=r"those of rows 1 = 2 are equal; give a chat template"):
        notes(in_tmp, *rows, tokenizer=make_tokenizer(template))


# Held-out prompts


def link(in_tmp):
    (in_tmp / "test.jsonl").symlink_to(in_tmp / "train.jsonl")
    return "test.jsonl"


def hard_link(in_tmp):
    os.link(in_tmp / "train.jsonl", in_tmp / "test.jsonl")
    return "test.jsonl"


def some(name, rows):
    def write(in_tmp):
        write_lines(in_tmp / name, *rows)
        return name

    return write


def csv_copy(in_tmp):
    with (in_tmp / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["answer", "question"])
        writer.writeheader()
        writer.writerows(ROWS[::-1])
    return "test.csv"


def saved(in_tmp):
    datasets.Dataset.from_list(ROWS[3:8]).save_to_disk(in_tmp / "saved")
    return "./saved"


SAME = {
    "the same name": lambda in_tmp: "train.jsonl",
    "another spelling": lambda in_tmp: "./train.jsonl",
    "absolute": lambda in_tmp: str(in_tmp / "train.jsonl"),
    "a link": link,
    "a hard link": hard_link,
    "a copy": some("copy.jsonl", ROWS),
    "a slice": some("slice.jsonl", ROWS[4:9]),
    "another order": some("order.jsonl", ROWS[::-1]),
    "other answers": some("answers.jsonl", [row | {"answer": "#### 5"} for row in ROWS]),
    "other spaces": some(
        "spaces.jsonl", [row | {"question": f"  {row['question'].replace(' ', '  ')}\n"} for row in ROWS]
    ),
    "messages": some(
        "chat.jsonl", [row | {"question": [{"role": "user", "content": row["question"]}]} for row in ROWS]
    ),
    "csv": csv_copy,
    "a saved slice": saved,
}


def load(held_out, train="train.jsonl"):
    config = configure({"source": train}, {"source": held_out})
    return load_data(config, Rendering(config, make_tokenizer()))


@pytest.mark.parametrize("name", SAME)
def test_rows_of_the_training_by_another_name_are_refused(name, in_tmp):
    write_lines(in_tmp / "train.jsonl", *ROWS)
    held_out = SAME[name](in_tmp)
    with pytest.raises(
        ConfigError, match=r"eval\.source: held-out prompts must not be those of the training, but each"
    ):
        load(held_out)


def test_an_overlap_is_told_with_its_rows(in_tmp):
    write_lines(in_tmp / "train.jsonl", *ROWS[:12])
    write_lines(in_tmp / "test.jsonl", *ROWS[10:])
    train, held_out = load("test.jsonl")
    assert (len(train.prompts), len(held_out.prompts), train.notes) == (12, 10, ())
    assert held_out.notes == ("eval: 2 of 10 held-out prompts are training prompts too (rows 1, 2)",)


def test_rows_of_their_own_are_fine(in_tmp):
    write_lines(in_tmp / "train.jsonl", *ROWS[:12])
    write_lines(in_tmp / "test.jsonl", *ROWS[12:])
    assert load("test.jsonl")[1].notes == ()


def test_the_second_half_of_a_conversation_is_not_the_whole(in_tmp):
    """Rows with the same last words and another beginning are different prompts."""
    ends = {"role": "user", "content": "And then?"}
    chats = [[{"role": "user", "content": n}, {"role": "assistant", "content": "a"}, ends] for n in "xyz"]
    write_lines(in_tmp / "train.jsonl", *[{"question": chat, "answer": "1"} for chat in chats[:2]])
    write_lines(in_tmp / "test.jsonl", json.loads(json.dumps({"question": chats[2], "answer": "1"})))
    config = configure({"source": "train.jsonl"}, {"source": "test.jsonl"})
    train, held_out = load_data(config, Rendering(config, make_tokenizer(CHAT)))
    assert train.notes == held_out.notes == () and len(held_out.prompts) == 1
