"""Tiny random models and samples for the tests of the policy and its trainer."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo.types import Sample

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_model(kind: str = "llama", tied: bool = True, **changes: Any) -> Any:
    """About 25 thousand parameters, large enough that its logprobs differ from uniform."""
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    return model(config(**SHAPE | {"tie_word_embeddings": tied, "initializer_range": 0.2} | changes))


def tiny_folder(path: Path, **options: Any) -> Path:
    """The model with a word-level tokenizer of its vocabulary, as Hugging Face folder."""
    tiny_model(**options).save_pretrained(path)
    words = models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(path)
    return path


def random_samples(count: int, seed: int = 0, advantages: Sequence[float] = (1.0, -1.0, 0.5, -2.0)) -> list[Sample]:
    """Rows of 2 to 20 tokens, some with the same prompt, whose rollout logprobs lie near those of a uniform policy."""
    rng = random.Random(seed)
    rows: list[Sample] = []
    for index in range(count):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 8)))
        if index % 3 == 2:
            prompt = rows[index // 2].prompt_ids
        output = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12)))
        logprobs = tuple(rng.gauss(-4.1, 0.3) for _ in output)
        advantage = advantages[index % len(advantages)]
        rows.append(Sample(f"p{index}", 0, prompt, output, logprobs, ((0, 0),), "stop", "", 0.0, advantage))
    return rows
