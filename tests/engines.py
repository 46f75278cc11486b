"""A rollout engine in a process of its own, as Ray would hold it, and tiny models to put into it.

The module loads no torch: the engine's process starts from it and must be free to fork.
"""

import asyncio
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.rollout.engine import RolloutEngine

START_SECONDS = 240.0
CALL_SECONDS = 60.0
EOS = 1


class EngineProcess:
    """Calls verbs of a `RolloutEngine` that lives in a child process; its exceptions are raised here."""

    def __init__(self, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(config, theirs), daemon=False)
        self.process.start()
        theirs.close()
        self.thread = ThreadPoolExecutor(1)
        self.pids: list[int] = self.call("start", seconds=START_SECONDS)

    def call(self, verb: str, *args: Any, seconds: float = CALL_SECONDS) -> Any:
        self.pipe.send((verb, args))
        assert self.pipe.poll(seconds), f"{verb} has not answered after {seconds} s"
        result = self.pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def begin(self, verb: str, *args: Any) -> "Future[Any]":
        """Calls a verb in the background; one at a time."""
        return self.thread.submit(self.call, verb, *args)

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(("stop", ()))
            self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.thread.shutdown()


def serve(config: Config, pipe: Connection) -> None:
    asyncio.run(answer(config, pipe))


async def answer(config: Config, pipe: Connection) -> None:
    """Answers one call after the other; the event loop runs on while it waits for the next."""
    engine = RolloutEngine(config, 0, "cpu")
    while True:
        verb, args = await asyncio.to_thread(pipe.recv)
        if verb == "stop":
            await engine.shutdown()
            return
        try:
            pipe.send(await do(engine, verb, args))
        except Exception as error:
            pipe.send(error)


async def do(engine: RolloutEngine, verb: str, args: tuple[Any, ...]) -> Any:
    if verb == "start":
        await engine.start()
        return engine.pids()
    if verb == "cached_tokens":
        output = await engine.complete(args[0], greedy(engine))
        return output.num_cached_tokens
    if verb == "environment":
        return {name: os.environ.get(name) for name in args}
    return await getattr(engine, verb)(*args)


def greedy(engine: RolloutEngine) -> Any:
    from grpo.types import Sampling

    return engine.build.sampling_params(Sampling(1, 1, 0.0, 1.0), 0, [])


def make_model(folder: Path, family: str, seed: int) -> Any:
    """A random fp32 model with peaked outputs and a tokenizer of single characters: tied Llama or untied Qwen2."""
    import torch
    import transformers

    shape = {
        "vocab_size": 100,  # not a multiple of 64: vLLM pads it
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # of 32: the CPU build knows no smaller heads
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    if family == "llama":
        config = transformers.LlamaConfig(**shape, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen2Config(**shape, tie_word_embeddings=False)
        model = transformers.Qwen2ForCausalLM(config)
    model = model.float().eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": EOS, "<unk>": 2}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def token_logprobs(model: Any, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Logprobs of tokens 1..T-1 according to transformers."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)])).logits[0, :-1].float() / temperature
    picked = logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:]).unsqueeze(1))
    return [float(value) for value in picked[:, 0]]
