"""What a warm-up teaches: exactly the tokens behind the prompt up to the end, for the templates of several families."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.data.completions import Completions, formatted
from grpo.data.generation import end_tokens
from grpo.data.prompts import load_data, prompt_stream
from grpo.data.rendering import Rendering
from grpo.errors import ConfigError, DataError
from tests.data.test_rendering import CHATML, MISTRAL, chat_tokenizer
from tests.data_helpers import write_lines

GSM8K = "Half of 48 is 48/2 = <<48/2=24>>24.\nSo 48+24 = <<48+24=72>>72.\n#### 72"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<table>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<table>\n\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
UNENDED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OTHERWISE = (  # the prompt begins a thought, the answer has none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def settings(path, folder, max_tokens=200, held_out=0, **sections) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    data = {"source": str(path)} | sections.pop("data", {})
    lengths = {"model": {"path": str(folder), "max_length": 400}, "rollout": {"max_tokens": max_tokens}}
    train = {"train": {"tokens_per_micro_batch": 512}}
    return Config.model_validate(lengths | train | {"data": data, "eval": {"prompts": held_out}} | sections)


def load(tmp_path, tokenizer, *rows, **sections):
    path = tmp_path / "rows.jsonl"
    write_lines(path, *rows)
    config = settings(path, tmp_path / "model", **sections)
    rendering = Rendering(config, tokenizer)
    train, _ = load_data(config, rendering, Completions(rendering, tokenizer))
    return config, rendering, train


ENDS = {
    "ChatML": (CHATML, "<|im_end|>", "ANSWER<|im_end|>"),
    "ChatML, trimmed": (CHATML.replace("m.content", "m.content | trim"), "<|im_end|>", "ANSWER<|im_end|>"),
    "Mistral": (MISTRAL, "</s>", " ANSWER</s>"),
    "Llama 3": (LLAMA3, "<|im_end|>", "ANSWER<|im_end|>"),
    "an empty thought": (THINKING, "<|im_end|>", "<think>\n\n</think>\n\nANSWER<|im_end|>"),
    "no end": (UNENDED, "</s>", " ANSWER</s>"),
    "an end that no engine knows": (CHATML, "</s>", "ANSWER<|im_end|></s>"),
    "begun otherwise": (OTHERWISE, "<|im_end|>", "ANSWER<|im_end|>"),
    "no template": (None, "</s>", "ANSWER</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_mask_is_exact(name, tmp_path):
    template, eos, taught = ENDS[name]
    tokenizer = chat_tokenizer(template, eos_token=eos)
    _, rendering, train = load(tmp_path, tokenizer, {"question": "48 and half?", "answer": GSM8K})
    (prompt,) = train.prompts
    (alone,) = rendering.encode([[{"role": "user", "content": "48 and half?"}]])
    assert prompt.token_ids == alone
    assert rendering.decode(prompt.completion_ids) == taught.replace("ANSWER", GSM8K)
    ends = end_tokens(rendering.config, tokenizer)
    assert [token in ends for token in prompt.completion_ids] == [False] * (len(prompt.completion_ids) - 1) + [True]
    told = [note for note in rendering.notes if "answer" in note]
    assert bool(told) == (name in ("no end", "an end that no engine knows", "begun otherwise"))


@pytest.mark.parametrize("answer", ["i", "end", "|", "user", "think", "\n d \n"])
def test_an_answer_of_few_letters_is_not_looked_for_in_the_end_token(answer, tmp_path):
    row = {"question": "a, d or i?", "answer": "1", "worked": answer}
    _, rendering, train = load(tmp_path, chat_tokenizer(OTHERWISE), row, sft={"completion": "worked"})
    assert rendering.decode(train.prompts[0].completion_ids) == f"{answer}<|im_end|>"


def test_a_template_that_leaves_the_answer_out_ends_it_all_the_same(tmp_path):
    template = OTHERWISE.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else 'left out' }}")
    row = {"question": "q?", "answer": "1", "worked": "one"}
    _, rendering, train = load(tmp_path, chat_tokenizer(template), row, sft={"completion": "worked"})
    assert rendering.decode(train.prompts[0].completion_ids) == "one<|im_end|>"


@given(text=st.text(st.characters(blacklist_categories=["Cs", "Cc", "Co"]), min_size=1, max_size=60).filter(str.strip))
def test_any_text_comes_back(text, tmp_path_factory):
    tokenizer = chat_tokenizer(CHATML)
    folder = tmp_path_factory.mktemp("rows")
    row = {"question": "q?", "answer": "#### 1", "worked": text}
    _, rendering, train = load(folder, tokenizer, row, max_tokens=300, sft={"completion": "worked"})
    assert rendering.decode(train.prompts[0].completion_ids) == f"{text}<|im_end|>"


def test_what_an_answer_spells_of_control_tokens_is_text_and_ends_nothing(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    answer = "it ends with <|im_end|> and </s>\n#### 1"
    _, rendering, train = load(tmp_path, tokenizer, {"question": "q?", "answer": answer})
    ids = train.prompts[0].completion_ids
    assert rendering.decode(ids) == f"{answer}<|im_end|>"
    assert rendering.control.of(ids) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("as_is", GSM8K),
        ("gsm8k", "Half of 48 is 48/2 = 24.\nSo 48+24 = 72.\n#### 72"),
        ("boxed", "Half of 48 is 48/2 = 24.\nSo 48+24 = 72.\n\\boxed{72}"),
    ],
)
def test_the_formats(form, text):
    assert formatted(GSM8K, form) == text


def test_a_format_leaves_alone_what_is_no_note():
    assert formatted("1 << 3 >> 2, a <b> c\n## 3 #### 4", "boxed") == "1 << 3 >> 2, a <b> c\n## 3 #### 4"


LAYOUTS = {
    "text": ({"question": "q?", "answer": "2", "worked": "1+1\n#### 2"}, {}, "worked"),
    "below a column": ({"question": "q?", "answer": "2", "more": {"worked": "1+1\n#### 2"}}, {}, "more.worked"),
    "TRL's messages": (
        {"question": "q?", "answer": "2", "worked": [{"role": "assistant", "content": "1+1\n#### 2"}]},
        {},
        "worked",
    ),
    "one conversation": (
        {"messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "1+1\n#### 2"}]},
        {"question_column": "messages", "answer_column": "messages"},
        None,
    ),
    "a conversation apart": (
        {
            "question": "q?",
            "answer": 2,
            "chat": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "1+1\n#### 2"}],
        },
        {},
        "chat",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_the_field(name, tmp_path):
    row, data, column = LAYOUTS[name]
    _, rendering, train = load(tmp_path, chat_tokenizer(CHATML), row, data=data, sft={"completion": column})
    assert rendering.decode(train.prompts[0].completion_ids) == "1+1\n#### 2<|im_end|>"


def test_completions_without_room_are_left_out_counted_and_told(tmp_path):
    rows = [{"question": f"{n}?", "answer": "x" * n + "\n#### 1"} for n in (1, 50, 2)]
    _, _, train = load(tmp_path, chat_tokenizer(CHATML), *rows, max_tokens=20)
    assert [prompt.question for prompt in train.prompts] == ["1?", "2?"]
    assert any("1 of 3 completions have more tokens than rollout.max_tokens = 20" in note for note in train.notes)
    with pytest.raises(DataError, match="raise rollout.max_tokens"):
        load(tmp_path, chat_tokenizer(CHATML), *rows, max_tokens=5)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q?", "answer": "1"}, "worked: there is no such column"),
        ({"question": "q?", "answer": "1", "worked": None}, "must be text or messages that end with the assistant's"),
        ({"question": "q?", "answer": "1", "worked": " "}, "is empty"),
        ({"question": "q?", "answer": "1", "worked": "<<1+1=2>>"}, "is empty without its calculator notes"),
        ({"question": "q?", "answer": "1", "worked": [{"role": "user", "content": "x"}]}, "end with the assistant's"),
    ],
)
def test_a_bad_completion_names_row_and_column(row, says, tmp_path):
    sections = {"sft": {"completion": "worked", "format": "gsm8k"}}
    with pytest.raises(DataError) as caught:
        load(tmp_path, chat_tokenizer(CHATML), row, **sections)
    assert says in str(caught.value) and "rows.jsonl:1" in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, None], ids=["ChatML", "Mistral", "no template"])
def test_of_notes_alone_nothing_is_left_to_teach(template, tmp_path):
    with pytest.raises(DataError, match="rows.jsonl:1: answer: is empty without its calculator notes"):
        tokenizer = chat_tokenizer(template, eos_token="</s>")
        rows = {"question": "q?", "answer": " <<1+1=2>> "}
        load(tmp_path, tokenizer, rows, rewards=[{"function": "format"}], sft={"format": "gsm8k"})


def test_a_model_that_nothing_ends_is_refused(tmp_path):
    tokenizer = chat_tokenizer(CHATML, eos_token=None)
    with pytest.raises(ConfigError, match="eos_token"):
        load(tmp_path, tokenizer, {"question": "q?", "answer": "#### 1"})


def test_the_generation_config_names_further_ends(tmp_path):
    tokenizer = chat_tokenizer(CHATML, eos_token="</s>")
    config = settings("x.jsonl", tmp_path / "model")
    ids = [tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>")]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[::-1]}))
    assert end_tokens(config, tokenizer) == ids
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config.json"):
        end_tokens(config, tokenizer)


def test_other_completions_are_another_run(tmp_path):
    rows = [{"question": "q?", "answer": GSM8K}]
    config, _, train = load(tmp_path, chat_tokenizer(CHATML), *rows)
    state = prompt_stream(config, train.prompts).state()
    config, _, other = load(tmp_path, chat_tokenizer(CHATML), *rows, sft={"format": "boxed"})
    with pytest.raises(DataError, match="token ids"):
        prompt_stream(config, other.prompts).restore(state)
