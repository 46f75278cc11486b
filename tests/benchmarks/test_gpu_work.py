import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.lengths import Lengths
from benchmarks.gpu.work import SPECIAL, lognormal, make_work, vocabulary_of, write_prompts, write_tokenizer


def test_the_work_of_the_published_comparison() -> None:
    work = make_work("1.5b", 64, 8)
    assert (work.rows, work.mean_prompt, work.mean("tail"), work.longest("tail")) == (512, 118.0, 200.0, 1491)
    assert (work.mean("512"), work.longest("512")) == (512.0, 512)
    assert work == make_work("1.5b", 64, 8)
    assert len({tuple(prompt) for prompt in work.prompts}) == 64
    flat = sorted(length for row in work.tail for length in row)
    assert flat[256] < 130 and flat[-6] > 700, "half of them are short, some are very long"


def test_prompts_are_text_of_those_very_ids_and_nothing_is_added(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    work = make_work("tiny", 6, 2)
    write_tokenizer(tmp_path, 2048)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    write_prompts(work, tmp_path / "prompts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [tokenizer(row["question"])["input_ids"] for row in rows] == work.prompts
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    assert [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats] == work.prompts
    assert len(tokenizer) == 2048 and tokenizer.eos_token_id == SPECIAL.index("<eos>")
    assert tokenizer.decode([100, 2047]) == f" {100:x} {2047:x}"


def test_every_token_has_a_word_of_its_own() -> None:
    assert len(set(vocabulary_of(151936))) == 151936


def test_the_tail_is_a_rule_that_forces_all_its_lengths(tmp_path: Path) -> None:
    work = make_work("tiny", 4, 3)
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"samples": 3, "rules": {"99": [work.phase("tail", 2), work.phase("5", 1)]}}))
    lengths = Lengths(file)
    for _ in range(2):
        assert [[lengths.of(99, prompt) for _ in range(3)] for prompt in work.prompts] == work.tail
    assert lengths.of(99, work.prompts[0]) == 5


@given(seed=st.integers(0, 99), count=st.integers(1, 80), mean=st.integers(2, 300), room=st.integers(0, 2000))
def test_lengths_have_that_mean_and_bounds(seed: int, count: int, mean: int, room: int) -> None:
    import random

    lengths = lognormal(random.Random(seed), count, mean, 1.0, mean + room)
    assert sum(lengths) == count * mean
    assert min(lengths) >= 1 and max(lengths) <= mean + room
