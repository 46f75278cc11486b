"""The work that all systems get: a model of random weights, prompts, lengths. Made on the spot, the same every time.

python -m benchmarks.gpu.work FOLDER SHAPE DEVICE   makes the model's folder
"""

import json
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.lengths import key_of

SEED = 0
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 2048,
    },
}
"""Sizes of Qwen2 models; 1.5b is that of Qwen2-1.5B: 1.544 billion parameters."""
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNKNOWN)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""What is said and nothing else: one of the systems takes messages alone."""
LETTERS = string.ascii_letters + string.digits
PROMPT_TOKENS = 118
SPREAD = 0.3
"""Of the logarithm of prompts' lengths."""
TAIL, TAIL_MEAN, TAIL_SPREAD, TAIL_MOST = "tail", 200, 1.0, 1600
"""The long tail: as many tokens in all as completions of 200, by a lognormal law, none above 1600."""


@dataclass(frozen=True)
class Work:
    """Prompts as ids, how often a step completes each, and the lengths of the long tail, a row a prompt."""

    prompts: list[list[int]]
    samples: int
    tail: list[list[int]]

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return len(self.prompts) * self.samples

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompts))

    @property
    def mean_prompt(self) -> float:
        return sum(map(len, self.prompts)) / len(self.prompts)

    def longest(self, tokens: str) -> int:
        """Tokens of the longest completion of such a run."""
        return max(map(max, self.tail)) if tokens == TAIL else int(tokens)

    def mean(self, tokens: str) -> float:
        """Mean tokens of a completion."""
        return sum(map(sum, self.tail)) / self.rows if tokens == TAIL else float(tokens)

    def phase(self, tokens: str, batches: int) -> dict[str, Any]:
        """The rule of `lengths.py` for so many batches."""
        if tokens != TAIL:
            return {"batches": batches, "tokens": int(tokens)}
        rows = zip(self.prompts, self.tail, strict=True)
        return {"batches": batches, "rows": {key_of(prompt): lengths for prompt, lengths in rows}}


def make_work(shape: str, prompts: int, samples: int) -> Work:
    """The same for the same arguments. A tiny model's long tail is an eighth as long."""
    chance = random.Random(SEED)
    scale = 8 if shape == "tiny" else 1
    lengths = lognormal(chance, prompts, PROMPT_TOKENS // scale, SPREAD, 3 * PROMPT_TOKENS // scale)
    ids = [[chance.randrange(len(SPECIAL), len(SPECIAL) + len(LETTERS)) for _ in range(length)] for length in lengths]
    tail = lognormal(chance, prompts * samples, TAIL_MEAN // scale, TAIL_SPREAD, TAIL_MOST // scale)
    return Work(ids, samples, [tail[row * samples : (row + 1) * samples] for row in range(prompts)])


def lognormal(chance: random.Random, count: int, mean: int, spread: float, most: int) -> list[int]:
    """So many lengths from 1 to `most` whose mean is that very number."""
    drawn = [chance.lognormvariate(0.0, spread) for _ in range(count)]
    low, high = 0.0, float(most)
    for _ in range(60):  # the factor that gives the mean, once all are cut at `most`
        factor = (low + high) / 2
        total = sum(min(most, max(1.0, factor * value)) for value in drawn)
        low, high = (factor, high) if total < count * mean else (low, factor)
    lengths = [min(most, max(1, round(high * value))) for value in drawn]
    off = count * mean - sum(lengths)
    order = sorted(range(count), key=lambda place: abs(lengths[place] - mean))
    while off:  # what rounding has moved, by one token each
        for place in order:
            step = (off > 0) - (off < 0)
            if off and 1 <= lengths[place] + step <= most:
                lengths[place] += step
                off -= step
    return lengths


def write_prompts(work: Work, file: Path) -> None:
    """Rows of a question, as text that the tokenizer takes apart into those very ids."""
    rows = [{"question": text_of(prompt), "answer": "0"} for prompt in work.prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def text_of(prompt: Sequence[int]) -> str:
    """The text of ids that are letters."""
    return "".join(LETTERS[token - len(SPECIAL)] for token in prompt)


def vocabulary_of(size: int) -> list[str]:
    """Three special tokens, letters, then numbers in base 16 behind a space: text in which rewards find an e."""
    known = [*SPECIAL, *LETTERS]
    return [*known, *(f"\u0120{number:x}" for number in range(len(known), size))]  # U+0120: a space in such files


def write_tokenizer(folder: Path, size: int) -> None:
    """Qwen2's, without merges: a letter is a token, other tokens are never made from text, and nothing is added."""
    from transformers import Qwen2Tokenizer

    vocabulary = {word: at for at, word in enumerate(vocabulary_of(size))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def make_model(folder: Path, shape: str, device: str) -> None:
    """Random weights in bfloat16, as transformers begins them."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen2Config(
        **SHAPES[shape],
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=None,
    )
    partial = folder.with_name(f"{folder.name}.partial")
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    model.bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(partial)
    write_tokenizer(partial, config.vocab_size)
    partial.rename(folder)
    print(f"{folder}: {sum(param.numel() for param in model.parameters()):,} parameters")


def main(arguments: Sequence[str]) -> None:
    folder, shape, device = arguments
    if not Path(folder).exists():
        make_model(Path(folder), shape, device)


if __name__ == "__main__":
    main(sys.argv[1:])
