"""The built-in task is always the same, right and disjoint; the shipped model is what its page says."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from grpo.config.load import load_config
from grpo.data.arithmetic import MAX_ROWS, rows
from grpo.errors import DataError
from grpo.rewards.gsm8k import gsm8k

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
LINE = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def test_first_rows_are_pinned():
    assert rows("train", 2) == [
        {
            "question": "7 friends bring 8 marbles each. How many marbles do they bring?",
            "answer": "7 * 8 = 56\n#### 56",
        },
        {
            "question": "Leo has 44 stamps and gives 5 to Finn. How many stamps are left?",
            "answer": "44 - 5 = 39\n#### 39",
        },
    ]


@pytest.mark.parametrize(("split", "digest"), [("train", "2a2e6ec4b7a9c7cf"), ("test", "05f60eccb7e1b73a")])
def test_rows_are_the_same_on_every_machine(split, digest):
    text = json.dumps(rows(split, 1000), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_fewer_rows_are_the_first_of_more():
    assert rows("test", 100) == rows("test", 300)[:100]


def test_splits_are_disjoint_and_have_no_duplicates():
    train = {row["question"] for row in rows("train", 20_000)}
    test = {row["question"] for row in rows("test", 3_000)}
    assert (len(train), len(test)) == (20_000, 3_000)
    assert not train & test


def test_every_answer_is_right():
    """Recomputed from the numbers of the question, in their order."""
    for row in rows("train", 3_000):
        numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
        *working, final = row["answer"].split("\n")
        value = numbers[0]
        assert len(working) == len(numbers) - 1
        for line, operand in zip(working, numbers[1:], strict=True):
            left, operator, right, result = LINE.fullmatch(line).groups()
            assert (int(left), int(right)) == (value, operand)
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
            assert int(result) == value
        assert final == f"#### {value}"
        assert 2 <= value <= 121


def test_the_wording_says_what_the_working_does():
    words = {
        "buys": "+",
        "finds": "+",
        "gets": "+",
        "gives": "-",
        "fewer": "-",
        "loses": "-",
        "sells": "-",
        "each": "*",
    }
    for row in rows("train", 500):
        operators = [LINE.fullmatch(line)[2] for line in row["answer"].split("\n")[:-1]]
        for word, operator in words.items():
            if re.search(rf"\b{word}\b", row["question"]) and not re.search(r"buys \d+ bags", row["question"]):
                assert operator in operators, row


@pytest.mark.parametrize(("text", "reward"), [("{answer}", 1.0), ("{answer}0", 0.0), ("", 0.0)])
def test_reward_reads_the_answers(text, reward):
    for row in rows("test", 50):
        assert gsm8k(row["question"], text.format(answer=row["answer"]), row["answer"]) == reward


def test_more_rows_than_the_task_has_are_refused():
    with pytest.raises(
        DataError, match=f"has {MAX_ROWS} different rows a split, but data.size asks for {MAX_ROWS + 1}"
    ):
        rows("train", MAX_ROWS + 1)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QUICKSTART / "model")


@pytest.fixture(scope="module")
def config():
    return load_config(QUICKSTART.with_suffix(".yaml"))


def test_every_row_survives_the_shipped_tokenizer(tokenizer, config):
    """Also within the lengths that the quickstart allows."""
    for row in rows("train", 1000) + rows("test", 1000):
        prompt = config.data.prompt_format.format(question=row["question"])
        prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(row["answer"])
        assert tokenizer.decode(prompt_ids) + tokenizer.decode(answer_ids) == prompt + row["answer"]
        assert prompt_ids + answer_ids == tokenizer.encode(prompt + row["answer"])
        assert len(answer_ids) + 1 <= config.rollout.max_tokens
        assert len(prompt_ids) + config.rollout.max_tokens <= config.model.max_length


@pytest.mark.parametrize(
    "text", ["####19\n\n  x", "Grüße, 日本 🙂\t\\boxed{5}", "1,234.50 apples", " leading and trailing "]
)
def test_any_text_survives_the_shipped_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_digit_is_a_token_and_a_word_is_a_token(tokenizer):
    ids = tokenizer.encode("Ana has 12 apples.\nAnswer:\n12 + 7 = 19\n#### 19")
    pieces = ["Ana", " has", " ", "1", "2", " apples", ".", "\nAnswer:\n"]
    pieces += ["1", "2", " + ", "7", " = ", "1", "9", "\n#### ", "1", "9"]
    assert [tokenizer.decode([token]) for token in ids] == pieces


def test_model_folder_is_small_tied_and_ends_with_its_tokenizer(tokenizer):
    files = [path for path in QUICKSTART.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    model = json.loads((QUICKSTART / "model" / "config.json").read_text())
    assert model["tie_word_embeddings"] is True
    assert model["vocab_size"] == len(tokenizer)
    assert model["eos_token_id"] == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.slow
def test_the_shipped_model_knows_its_sums_and_is_unsure_of_them(tokenizer, make_model):
    """The claims of examples/quickstart/README.md, with room for 256 draws (standard error 0.03)."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(QUICKSTART / "model", dtype=torch.float32)
    assert make_model.accuracy(model, tokenizer, 256, sample=False) > 0.98
    assert 0.33 < make_model.accuracy(model, tokenizer, 256, sample=True) < 0.53


@pytest.fixture(scope="module")
def make_model():
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spoilt_answers_are_spoilt_at_the_given_rates(make_model):
    from random import Random

    random = Random(0)
    answer = "12 + 7 = 19\n19 - 4 = 15\n#### 15"
    assert make_model.spoil(answer, random, wrong=0, formless=0) == answer
    spoilt = [make_model.spoil(answer, random, wrong=0.3, formless=0.2) for _ in range(5000)]
    formless = sum("####" not in text for text in spoilt) / 5000
    first_wrong = sum(not text.startswith("12 + 7 = 19\n") for text in spoilt) / 5000
    assert (formless, first_wrong) == (pytest.approx(0.2, abs=0.02), pytest.approx(0.3, abs=0.02))


def test_a_slip_is_carried_on(make_model):
    """The working stays consistent with itself, as a person's would: only the slip is wrong."""
    from random import Random

    random = Random(1)
    for _ in range(200):
        first, second, final = make_model.spoil("12 + 7 = 19\n19 - 4 = 15\n#### 15", random, 0.5, 0).split("\n")
        assert second.startswith(first.split(" = ")[1] + " - 4 = ")
        assert final == "#### " + second.split(" = ")[1]


def test_the_frame_of_the_prompt_is_the_one_it_was_made_with(make_model, config):
    assert config.data.prompt_format == make_model.PROMPT_FORMAT
