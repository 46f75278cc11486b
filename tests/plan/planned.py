"""Configurations of models of known sizes."""

import json
from pathlib import Path
from typing import Any

from grpo.config import Config

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
QWEN_1_5B: dict[str, Any] = dict(zip("hiLHKVt", (1536, 8960, 28, 12, 2, 151936, True), strict=True), model_type="qwen2")
SMOLLM2: dict[str, Any] = dict(zip("hiLHKVt", (576, 1536, 30, 9, 3, 49152, True), strict=True), model_type="llama")
KEYS = {
    "h": "hidden_size",
    "i": "intermediate_size",
    "L": "num_hidden_layers",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "V": "vocab_size",
    "t": "tie_word_embeddings",
}


def config(folder: Path, sizes: dict[str, Any] | str, **sections: Any) -> Config:
    text = sizes if isinstance(sizes, str) else json.dumps({KEYS.get(key, key): value for key, value in sizes.items()})
    (folder / "config.json").write_text(text)
    sections["model"] = {"path": str(folder)} | sections.get("model", {})
    return Config.model_validate(sections)
