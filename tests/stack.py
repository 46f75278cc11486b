"""An engine process, the trainer's model in this process, and the transfer group between them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.errors import ClusterError
from grpo.types import Group, Manifest, Prompt, Sampling, TensorRecord
from tests.engines import EngineProcess, make_model, token_logprobs
from tests.ranks import free_port

PROMPT = tuple(range(5, 60))
SAMPLING = Sampling(samples_per_prompt=4, max_tokens=24, temperature=1.0, top_p=1.0)
PARITY = 1e-4  # nats; fp32 on both sides differs by about 4e-6


def make_config(path: str, dtype: str = "float32") -> Config:
    return Config.model_validate(
        {
            "model": {"path": path, "dtype": dtype, "max_length": 400},
            "rollout": {"max_tokens": 24, "kv_cache_gib": 0.125, "prompts_per_step": 4},
            "train": {"tokens_per_micro_batch": 512},
            "deadlines": {"sync": 10, "rollout": 60},
        }
    )


@dataclass
class Stack:
    engine: EngineProcess
    model: Any
    config: Config
    sender: Any = None

    def join(self) -> None:
        """Forms a transfer group, the first one or a new one."""
        from grpo.weights import make_transport

        if self.sender is not None:
            self.sender.close()
        url = f"gloo://127.0.0.1:{free_port()}"
        joining = self.engine.begin("join_transfer", url, 1, 2, "secret")
        self.sender = make_transport(self.config, "cpu", url, 0, 2, "secret")
        joining.result()

    def tensors(self) -> list[tuple[str, Any]]:
        return [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]

    def records(self) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.tensors()
        )

    def exchange(
        self, version: int, tensors: Any = None, records: Any = None, ahead: bool = False
    ) -> tuple[Manifest, list[Manifest]]:
        """What was sent and what was received; nothing is compared or committed."""
        announced = self.records() if records is None else records
        receiving = self.engine.begin("receive_weights", version, announced, ahead)
        sent = Manifest(version, self.sender.send(version, self.tensors() if tensors is None else tensors))
        return sent, receiving.result()

    def sync(self, version: int) -> None:
        from grpo.weights import verify

        verify(*self.exchange(version))
        self.engine.call("commit_weights", version)

    def cut_half_way(self, version: int) -> None:
        """A sync whose trainer dies in its middle; both ends say so, before the deadline of a sync."""
        tensors = self.tensors()

        def cut() -> Iterator[tuple[str, Any]]:
            yield from tensors[: len(tensors) // 2]
            raise OSError("the trainer died")

        receiving = self.engine.begin("receive_weights", version, self.records())
        began = time.monotonic()
        with pytest.raises(OSError, match="the trainer died"):
            self.sender.send(version, cut())
        with pytest.raises(ClusterError, match="engine 0, receive_tensors: .* broke off"):
            receiving.result(30)
        assert time.monotonic() - began < self.config.deadlines.sync

    def generate(self, prompts: list[Prompt], sampling: Sampling = SAMPLING, seed: int = 7) -> list[Group]:
        return list(
            self.engine.call("generate", [(item, seed + 100 * row) for row, item in enumerate(prompts)], sampling)
        )

    def difference(self) -> float:
        """Mean |transformers - vLLM| of the prompt's logprobs."""
        return mean_difference(token_logprobs(self.model, PROMPT), self.engine.call("prompt_logprobs", PROMPT))

    def replace(self, seed: int) -> None:
        """Puts other random weights into the trainer's model."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.15 * noise)


def mean_difference(left: list[float], right: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def prompt(row: int, token_ids: tuple[int, ...] = PROMPT) -> Prompt:
    return Prompt(f"test:{row}", "a question", "an answer", token_ids)


@contextmanager
def open_stack(folder: Path, family: str, receiver: str | None = None) -> Iterator[Stack]:
    with joined(make_model(folder, family, seed=0), folder, receiver) as stack:
        yield stack


@contextmanager
def joined(model: Any, folder: Path, receiver: str | None = None) -> Iterator[Stack]:
    """An engine of the model that lies in the folder, and this process as its sender."""
    config = make_config(str(folder))
    stack = Stack(EngineProcess(config, receiver), model, config)
    try:
        stack.join()
        yield stack
    finally:
        if stack.sender is not None:
            stack.sender.close()
        stack.engine.close()
