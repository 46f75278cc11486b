"""`train.tokens_per_micro_batch: auto`: as many tokens as a GPU takes at once, found out before the first step.

Micro-batches of growing size are run through the engine, forward and backward, and thrown away. Their rows are the
longest that there may be. Shorter completions of a prompt that rows share leave room for more of it, which attention
sees in each row: a step's micro-batches have no more of that (`most_laid_out`), so they need no more memory. All ranks
take what the one with the least room takes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import distributed

from grpo.config import Config
from grpo.trainer.compiling import made_up_rows
from grpo.trainer.deepspeed import Engine
from grpo.trainer.fused_head import room_for_logits
from grpo.trainer.model import Policy
from grpo.trainer.packing import pack
from grpo.trainer.published import ROOM
from grpo.trainer.rehearsal import throw_away
from grpo.trainer.row_logprobs import RowLogprobs, scored

MOST = 65536
"""More tokens at once make nothing faster."""
FIRST = 1024
GROWTH = 4.0
"""A size is at most so many times the one before: what grows faster than the tokens shows itself."""
TRIALS = 10
GRAIN = 1024
"""Multiples that are chosen, so that two starts on the same GPU choose alike."""
SLACK = 1.1
"""A run keeps the size that it began with, up to so many times of what would be chosen now."""


class Meter(Protocol):
    """The memory of one device, in bytes."""

    def limit(self) -> int:
        """What this process may hold at most."""
        ...

    def held(self) -> int:
        """What it holds."""
        ...

    def peak(self, call: Callable[[], None]) -> int:
        """The most that it held while that ran."""
        ...


class Gpu:
    """That of a rank's GPU: all that is free, or its share where an engine has a part too."""

    def __init__(self, config: Config, policy: Policy, device: torch.device) -> None:
        self.config, self.policy, self.device = config, policy, device

    def limit(self) -> int:
        """Without what is left to fragments, kept logits and copies of the weights that travel."""
        free, total = torch.cuda.mem_get_info(self.device)
        own = free + torch.cuda.memory_reserved(self.device)
        share = min(1.0, self.config.train.gpus_per_rank or 1.0)
        ahead = self.config.rollout.max_staleness
        weights = sum(param.nbytes for param in self.policy.parameters())
        copies = weights * (ahead + 1) if ahead else 0
        return int(ROOM * min(own, share * total)) - room_for_logits(self.device) - copies

    def held(self) -> int:
        """Allocated bytes."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self, call: Callable[[], None]) -> int:
        """Allocated bytes at the worst moment."""
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device)


def choose_tokens(
    engine: Engine, policy: Policy, reference: RowLogprobs | None, config: Config, device: torch.device
) -> int:
    """The tokens of a micro-batch, the same on all ranks. A collective; nothing of it stays."""
    if config.train.tokens_per_micro_batch != "auto" or device.type != "cuda":
        return config.fixed_tokens
    chosen = measure_tokens(engine, policy, reference, config, device, Gpu(config, policy, device))
    torch.cuda.empty_cache()
    return chosen


def measure_tokens(
    engine: Engine, policy: Policy, reference: RowLogprobs | None, config: Config, device: torch.device, meter: Meter
) -> int:
    """By trials. A collective."""

    def run(tokens: int) -> None:
        rows = made_up_rows(config, policy, tokens)
        logprobs_C, entropy_C = engine(pack(rows).to(device))
        if reference:
            scored(reference.policy, rows, device)
        engine.backward(logprobs_C.mean() + (entropy_C.mean() if policy.entropy_gradient else 0.0), last=False)

    first = max(FIRST, config.model.max_length)
    run(first)  # gradients and what libraries take for good are there from here on
    held = meter.held()
    found = fitting_tokens(
        lambda tokens: _least((meter.limit() - held) / max(meter.peak(lambda: run(tokens)) - held, 1), device), first
    )
    throw_away(engine, device)
    return max(found, config.model.max_length)


def fitting_tokens(room: Callable[[int], float], first: int) -> int:
    """The most tokens that fit. `room(tokens)` tries so many: how many times what they took there is, at least."""
    tokens = first
    for _ in range(TRIALS):
        wanted = min(int(tokens * min(room(tokens), GROWTH)), MOST)
        if wanted < SLACK * tokens:
            return wanted // GRAIN * GRAIN if wanted > GRAIN else wanted
        tokens = wanted
    return tokens // GRAIN * GRAIN


def most_laid_out(config: Config, tokens: int, device: torch.device) -> float:
    """Tokens of whole rows in a micro-batch of so many, if that was tried: as many as the trial's rows had."""
    if config.train.tokens_per_micro_batch != "auto" or device.type != "cuda":
        return math.inf
    completion, count = config.rollout.max_tokens, config.rollout.samples_per_prompt
    prompt = max(1, config.model.max_length - completion)
    return max(tokens * count * (prompt + completion - 1) / (prompt + count * (completion - 1)), tokens)


def tokens_before(config: Config, header: Mapping[str, object]) -> object:
    """Those of the run that a checkpoint is of, by the header of its state; None where nobody knows them.

    An older one does not name them. What it had is no other number than today's, or `run.allow_drift` says so.
    """
    drifts = "train.tokens_per_micro_batch" in config.run.allow_drift
    return header.get("tokens_per_micro_batch", None if drifts else config.fixed_tokens)


def kept_tokens(config: Config, chosen: int, before: object) -> int:
    """Of a run that goes on: its own of `before`, as the packing decides bits; `chosen` if that is too much now."""
    if config.train.tokens_per_micro_batch != "auto" or not isinstance(before, int):
        return chosen
    return before if config.model.max_length <= before <= SLACK * chosen else chosen


def _least(value: float, device: torch.device) -> float:
    """That of the rank with the least."""
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MIN)
    return float(shared)
