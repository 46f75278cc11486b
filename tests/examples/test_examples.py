"""The examples load, say what they promise, and fit the model and the data that they name."""

import json
from pathlib import Path

import pytest

from examples.rewards import mentions_answer
from grpo.config.load import load_config
from grpo.rewards.registry import RewardScorer

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GSM8K_ROWS = ROOT.parent / "shared" / "data" / "gsm8k"
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"


def load(name):
    return load_config(ROOT / "examples" / name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_configuration(path):
    config = load_config(path)
    assert config.run.name == path.stem
    assert config.run.dir == f"runs/{path.stem}"
    with RewardScorer(config) as scorer:
        assert scorer.config is config


def test_gsm8k_is_the_recipe_for_two_gpus():
    config = load("gsm8k.yaml")
    assert (config.rollout.engines, config.rollout.tensor_parallel, config.train.ranks) == (1, 1, 1)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt, config.rollout.max_tokens) == (
        64,
        8,
        512,
    )
    assert (config.train.learning_rate, config.algorithm.loss, config.algorithm.kl_coef) == (1e-6, "dapo", 0.0)
    assert (config.data.source, config.data.subset) == ("openai/gsm8k", "main")
    assert [reward.function for reward in config.rewards] == ["gsm8k"]
    assert "####" in config.data.system_prompt


def test_gsm8k_smollm2_is_two_small_steps():
    config = load("gsm8k-smollm2.yaml")
    rollout = config.rollout
    assert (config.run.steps, rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_tokens) == (
        2,
        4,
        4,
        128,
    )
    assert ROOT / config.model.path == SMOLLM2


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="not built here: python examples/smollm2.py")
@pytest.mark.skipif(not GSM8K_ROWS.is_dir(), reason="the GSM8K rows are not on this machine")
def test_every_gsm8k_question_fits_the_context_of_smollm2():
    from transformers import AutoTokenizer

    config = load("gsm8k-smollm2.yaml")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    lines = [line for name in ("train", "test") for line in (GSM8K_ROWS / f"{name}.jsonl").open()]
    questions = sorted((json.loads(line)["question"] for line in lines), key=len)[-300:]
    chats = [
        [{"role": "system", "content": config.data.system_prompt}, {"role": "user", "content": question}]
        for question in questions
    ]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert longest == 265
    assert longest + config.rollout.max_tokens <= config.model.max_length


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="not built here: python examples/smollm2.py")
def test_built_smollm2_is_a_tied_llama_with_a_chat_template():
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = json.loads((SMOLLM2 / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["vocab_size"]) == ("llama", True, 49152)
    with safe_open(SMOLLM2 / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("1,234 apples").input_ids) == "1,234 apples"
    assert len(tokenizer("1234").input_ids) == 4  # one token a digit, as SmolLM2 was trained


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("so 1,072 in all.", 1.0), ("#### 1072", 1.0), ("10720 or 107", 0.0), ("", 0.0)],
)
def test_the_reward_for_smollm2_looks_for_the_right_number(completion, reward):
    assert mentions_answer("How many?", completion, "1000 + 72 = 1072\n#### 1,072") == reward
