"""A rollout engine in a process of its own, as Ray would hold it, and tiny models to put into it.

The processes are forked from a server that has imported vLLM once, which takes longer than all that most tests do with
an engine. How an engine starts by itself is what every test of the real stack begins with.
"""

import asyncio
import itertools
import os
import threading
import time
import types
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import Pipe, context, forkserver, popen_forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.rollout import core
from grpo.rollout.engine import RolloutEngine
from grpo.run.replaced import replaced

START_SECONDS = 240.0
CALL_SECONDS = 180.0
EOS = 1
SERVER = forkserver.ForkServer()
"""Not that of `ranks.py`, whose children have loaded DeepSpeed and compute with one thread."""
SERVER.set_forkserver_preload(["tests.engines_preload"])


class ForkedFromServer(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        with replaced(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            super()._launch(process)


class ForkedProcess(context.ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> ForkedFromServer:
        return ForkedFromServer(process)


class EngineProcess:
    """Calls verbs of a `RolloutEngine` that lives in a child process; its exceptions are raised here.

    `receiver` is the class that is mixed into vLLM's worker instead of ours. With `counted` the engine tells its own
    metrics; "counted" returns them.
    """

    def __init__(self, config: Config, receiver: str | None = None, counted: bool = False) -> None:
        self.pipe, theirs = Pipe()
        environment = dict(os.environ)
        self.process = ForkedProcess(target=serve, args=(config, theirs, receiver, counted, environment), daemon=False)
        self.process.start()
        theirs.close()
        self.pending: dict[int, Future[Any]] = {}
        threading.Thread(target=self.listen, daemon=True).start()
        self.pids: list[int] = self.call("start", seconds=START_SECONDS)

    def listen(self) -> None:
        while True:
            try:
                number, result = self.pipe.recv()
            except (EOFError, OSError):
                return
            if isinstance(result, Exception):
                self.pending[number].set_exception(result)
            else:
                self.pending[number].set_result(result)

    def call(self, verb: str, *args: Any, seconds: float = CALL_SECONDS) -> Any:
        return self.begin(verb, *args).result(seconds)

    def begin(self, verb: str, *args: Any) -> "Future[Any]":
        """Calls a verb in the background; several may be under way."""
        number = len(self.pending)
        self.pending[number] = Future()
        self.pipe.send((number, verb, args))
        return self.pending[number]

    def close(self) -> None:
        if self.process.is_alive():
            self.begin("stop")
            self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Told:
    """In the place of the classes of `ray.util.metrics`: the last value, the sum or the number of what was observed."""

    values: dict[str, float] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> None:
        self.name, self._tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self._tag_keys), tags
        self.values[self.name] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.set(self.values.get(self.name, 0) + value, tags)

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.inc(1, tags)


def serve(config: Config, pipe: Connection, receiver: str | None, counted: bool, environment: dict[str, str]) -> None:
    os.environ.clear()  # it was that of the test which started the server
    os.environ.update(environment)
    core.may_fork = lambda: True  # torch is loaded here, but has started no threads
    metrics: Any = types.SimpleNamespace(Gauge=Told, Counter=Told, Histogram=Told) if counted else None
    asyncio.run(answer(RolloutEngine(config, 0, "cpu", metrics), pipe, receiver))


async def answer(engine: RolloutEngine, pipe: Connection, receiver: str | None) -> None:
    """Starts a task for each call; the event loop runs on while it waits for the next."""
    if receiver is not None:
        use_receiver(receiver)
    tasks = set()
    while True:
        number, verb, args = await asyncio.to_thread(pipe.recv)
        if verb == "stop":
            await engine.shutdown()
            return
        tasks.add(asyncio.create_task(reply(engine, pipe, number, verb, args)))


async def reply(engine: RolloutEngine, pipe: Connection, number: int, verb: str, args: tuple[Any, ...]) -> None:
    try:
        pipe.send((number, await do(engine, verb, args)))
    except Exception as error:
        pipe.send((number, error))


def use_receiver(receiver: str) -> None:
    """Another class for vLLM's worker."""
    prepare = core.prepare_environment

    def prepare_and_replace(config: Config, device: str, together: int) -> None:
        prepare(config, device, together)
        from grpo.rollout import build

        original = build.engine_args

        def engine_args(config: Config, device: str) -> Any:
            args = original(config, device)
            args.worker_extension_cls = receiver
            return args

        build.engine_args = engine_args

    core.prepare_environment = prepare_and_replace


async def do(engine: RolloutEngine, verb: str, args: tuple[Any, ...]) -> Any:
    if verb == "start":
        await engine.start()
        return engine.pids()
    if verb == "cached_tokens":
        output = await engine.complete(args[0], greedy(engine))
        return output.num_cached_tokens
    if verb == "counted":
        return Told.values
    if verb == "environment":
        return {name: os.environ.get(name) for name in args}
    if verb == "attack":
        return await engine.llm.collective_rpc("attack", args=args)
    if verb == "renew":  # no fault of a test before is left; a model in pieces is one until the next whole sync
        engine.stale, engine.salts = None, map(str, itertools.count(time.time_ns()))
        return await engine.llm.engine_core.resume_scheduler_async()
    if verb == "pause":
        return await engine.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
    if verb == "unsalted":
        engine.salts = itertools.repeat(str(time.time_ns()))
        return None
    return await getattr(engine, verb)(*args)


def greedy(engine: RolloutEngine) -> Any:
    from grpo.types import Sampling

    return engine.build.sampling_params(Sampling(1, 1, 0.0, 1.0), 0, [])


def make_model(folder: Path, family: str, seed: int, dtype: str = "float32") -> Any:
    """A random model with peaked outputs and a tokenizer of single characters: tied Llama or untied Qwen2."""
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
    model = model.to(getattr(torch, dtype)).eval()
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
