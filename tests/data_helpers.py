"""Small pieces for the tests of data: a byte tokenizer, a config, files."""

import json

import pytest

from grpo.config import Config
from grpo.data.prompts import train_prompts
from grpo.errors import DataError

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
