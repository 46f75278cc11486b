"""Makes the model folder of the quickstart: a tokenizer and a small Llama that knows its sums but is not sure of them.

    python examples/quickstart/make_model.py --out examples/quickstart/model

Supervised learning on the built-in task, with targets that are spoilt on purpose: some results are wrong, and some
answers miss their `####` line. A model cannot tell which targets will be spoilt, so it learns to be right nearly always
when it is greedy and much less often when it is sampled. That leaves GRPO something to do that takes minutes, not days.
"""

import argparse
import re
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.data.arithmetic import OPERATIONS, rows

PROMPT_FORMAT = "{question}\nAnswer:\n"
PIECES = r"\nAnswer:\n|\n#### | [-+*=] |\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"
"""What is never merged across: one token for the frame of the answer, one for each digit, one for each word."""
END, PAD = "<|end|>", "<|pad|>"
IGNORED = -100
MAX_LENGTH = 512


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded and decodes to itself; every piece of the task is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=alphabet, special_tokens=[END, PAD], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def spoil(answer: str, random: Random, wrong: float, formless: float) -> str:
    """The answer with each result wrong at the rate `wrong`, carried on like a slip of the pen, and at the rate
    `formless` with a last line that has no `####`, or with no last line at all."""
    *working, _ = answer.split("\n")
    lines, slip = [], 0
    for line in working:
        left, operator, right, _, _ = line.split(" ")
        value = OPERATIONS[operator](int(left) + slip, int(right))
        truth = OPERATIONS[operator](int(left), int(right))
        if random.random() < wrong:
            value = max(0, value + random.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
        lines.append(f"{int(left) + slip} {operator} {right} = {value}")
        slip = value - truth
    if random.random() < formless:
        return "\n".join(lines + random.choice(([], [f"Answer {value}"])))
    return "\n".join([*lines, f"#### {value}"])


def pad(rows_BT: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    width = max(len(row) for row in rows_BT)
    filler = [[value] * (width - len(row)) for row in rows_BT]
    return torch.tensor([fill + row if left else row + fill for row, fill in zip(rows_BT, filler, strict=True)])


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """AdamW with a warm-up and a cosine; the loss is over the answer alone."""
    random, data = Random(args.seed), rows("train", args.questions)
    prompts = tokenizer([PROMPT_FORMAT.format(question=row["question"]) for row in data])["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        chosen = random.sample(range(len(data)), args.rows)
        answers = [spoil(data[i]["answer"], random, args.wrong, args.formless) + END for i in chosen]
        answers_BC = tokenizer(answers)["input_ids"]
        input_ids_BT = [prompts[i] + answer_C for i, answer_C in zip(chosen, answers_BC, strict=True)]
        labels_BT = [[IGNORED] * len(prompts[i]) + answer_C for i, answer_C in zip(chosen, answers_BC, strict=True)]
        loss = model(
            input_ids=pad(input_ids_BT, tokenizer.pad_token_id).to(model.device),
            labels=pad(labels_BT, IGNORED).to(model.device),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: int, sample: bool) -> float:
    """Share of held-out questions with the right number after `####`: greedy, or one sample each at temperature 1."""
    right, data = 0, rows("test", questions)
    for start in range(0, questions, 256):
        batch = data[start : start + 256]
        prompts = tokenizer([PROMPT_FORMAT.format(question=row["question"]) for row in batch])["input_ids"]
        input_ids_BT = pad(prompts, tokenizer.pad_token_id, left=True).to(model.device)
        output_ids_BT = model.generate(
            input_ids_BT,
            attention_mask=(input_ids_BT != tokenizer.pad_token_id).long(),
            max_new_tokens=32,
            **({"do_sample": True, "top_k": 0} if sample else {"do_sample": False}),
        )
        texts = tokenizer.batch_decode(output_ids_BT[:, input_ids_BT.shape[1] :], skip_special_tokens=True)
        right += sum(final(text) == final(row["answer"]) for text, row in zip(texts, batch, strict=True))
    return right / questions


def final(text: str) -> str | None:
    found = re.search(r"#### (\d+)$", text)
    return found.group(1) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wrong", type=float, default=0.3, help="rate of wrong results, per line of working")
    parser.add_argument("--formless", type=float, default=0.3, help="rate of answers without a #### line")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=256, help="rows of a step")
    parser.add_argument("--questions", type=int, default=20_000, help="different training questions")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = [PROMPT_FORMAT.format(question=row["question"]) + row["answer"] for row in rows("train", args.questions)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    for sample in (False, True):
        name = "sampled" if sample else "greedy"
        print(f"{name} accuracy on 1024 held-out questions: {accuracy(model, tokenizer, 1024, sample):.3f}", flush=True)


if __name__ == "__main__":
    main()
