"""Tokens: what a prompt is made of, that it is tokenised once, and which tokenizer is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config import Config
from grpo.data.prompts import load_tokenizer, train_prompts
from grpo.errors import ConfigError
from tests.data_helpers import CHAT, GOOD, configure, failure, make_tokenizer, write_lines


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


def test_a_system_prompt_needs_a_chat_template(in_tmp, tokenizer):
    write_lines(in_tmp / "rows.jsonl", GOOD)
    message = failure(configure({"source": "rows.jsonl", "system_prompt": "Be exact."}), tokenizer, ConfigError)
    assert message.startswith("data.system_prompt: ") and "data.prompt_format" in message


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
    assert [count for count in calls if count > 9] == [1024, 476]
    assert [text_of(prompts[index], tokenizer) for index in (0, 1023, 1024, 1499)] == [
        f"<s>{number}?" for number in (0, 1023, 1024, 1499)
    ]


def test_a_format_without_the_question_is_refused():
    with pytest.raises(ValueError, match=r"write \{question\} where it shall stand"):
        configure({"prompt_format": "Answer: {Question}"})


# Tokenizer


def test_a_tokenizer_is_loaded_from_the_model_folder(in_tmp):
    make_tokenizer(CHAT).save_pretrained("models/tiny")
    tokenizer = load_tokenizer(configure({}))
    assert tokenizer("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]
    assert tokenizer.chat_template == CHAT


def make_qwen():
    from transformers import Qwen2Tokenizer

    letters = {letter: place for place, letter in enumerate(["<pad>", "<end>", "a", "b", "ab", "Ġ", "Ġa"])}
    made = Qwen2Tokenizer(letters, [("a", "b"), ("Ġ", "a")], unk_token="<pad>", eos_token="<end>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def test_plain_folders_need_no_torch_and_give_what_auto_tokenizer_gives(in_tmp):
    made = [
        ("llama", ""),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen2", "Qwen2TokenizerFast"),
        ("qwen3_moe", "Qwen2Tokenizer"),
    ]
    for number, (model_type, name) in enumerate(made):
        folder = in_tmp / f"models/{number}"
        (make_qwen() if name else make_tokenizer(CHAT)).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | ({"tokenizer_class": name} if name else {})))
    program = """
import sys
from grpo.config import Config
from grpo.data.prompts import load_tokenizer
folders = [f"models/{number}" for number in range(4)]
all_ours = [load_tokenizer(Config.model_validate({"model": {"path": folder}})) for folder in folders]
assert "torch" not in sys.modules
from transformers import AutoTokenizer
for folder, ours in zip(folders, all_ours):
    auto = AutoTokenizer.from_pretrained(folder)
    assert type(auto) is type(ours) and auto.init_kwargs == ours.init_kwargs, folder
    assert all(auto(text) == ours(text) for text in ("ab", "a b ab", " ab<end>b")), folder
    assert auto.chat_template == ours.chat_template
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=env)


def test_a_model_without_a_tokenizer_is_refused(in_tmp):
    with pytest.raises(ConfigError, match="model.path: no tokenizer can be loaded from models/tiny"):
        (in_tmp / "models/tiny").mkdir(parents=True)
        load_tokenizer(configure({}))
    (in_tmp / "models/tiny/tokenizer.json").write_text('{"model": {"type": "nonsense"}}')
    (in_tmp / "models/tiny/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="model.path: no tokenizer can be loaded from models/tiny"):
        load_tokenizer(configure({}))


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "runs/model/final"])
def test_a_missing_model_folder_is_no_search_on_the_hub(path, in_tmp, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: asked.append(names) or [])
    with pytest.raises(ConfigError, match=f"model.path: there is no folder {path} in "):
        load_tokenizer(Config.model_validate({"model": {"path": path}}))
    assert asked == []
