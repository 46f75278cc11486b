"""Engines of models whose tensors have other names in transformers, or other layers, than those of a Llama."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import EOS, make_tokenizer
from tests.stack import PARITY, Stack, joined

SHAPE = {"vocab_size": 128, "initializer_range": 0.15, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": 0}
LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": False}


def make(family: str) -> Any:
    """Experts that transformers fuses and renames; a tied head whose embedding is not called embed_tokens."""
    import torch
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **sizes))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **LLAMA, **experts))


@pytest.fixture(params=["mixtral", "gpt2"])
def stack(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    from grpo.trainer.weights import LiveWeights

    model = make(request.param).float().eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(Stack, "tensors", lambda self: list(LiveWeights(self.model).published()))
    with joined(model, tmp_path) as stack:
        yield stack


@pytest.mark.slow
def test_an_engine_follows_as_it_was_loaded(stack: Stack) -> None:
    """The same weights once more, then others: packed copies of experts and of a tied head must follow."""
    stack.sync(version=1)
    assert stack.difference() < PARITY
    stack.replace(seed=1)
    assert stack.difference() > 0.5
    stack.sync(version=2)
    assert stack.difference() < PARITY
