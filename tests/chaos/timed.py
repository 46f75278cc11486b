"""Engines and ranks that take as long as the benchmark of the overlap says; see benchmarks/overlap.py.

What they sample and learn is nothing; who waits for whom is the product's, with real Ray.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import ClassVar

from grpo.interfaces import Place
from grpo.types import Group, Prompt, Sample, Sampling, Stats
from tests.chaos.actors import STEP_SECONDS, FakeEngineActor, FakeRankActor

PLACES = 8
"""Completions that an engine decodes together."""
BATCH_SECONDS = 1.0
"""What the engine needs for a batch with all places busy, and the trainer for its step."""
TOKENS = 16
TAIL = 10.0
"""Length of one completion of each batch, in mean lengths."""


class EvenEngine(FakeEngineActor):
    """All completions are equally long."""

    tail: ClassVar[float] = 1.0

    async def start(self) -> Place:
        self.places = asyncio.Semaphore(PLACES)
        return await super().start()

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        count = sampling.samples_per_prompt
        total = len(requests) * count
        mean = BATCH_SECONDS * PLACES / total
        usual = mean * (total - self.tail) / (total - 1)
        odd = requests[0][1] % total  # another place in each batch
        draws = [
            self._draw(prompt, index, mean * self.tail if row * count + index == odd else usual)
            for row, (prompt, _) in enumerate(requests)
            for index in range(count)
        ]
        samples = await asyncio.gather(*draws)
        return [
            Group(prompt, tuple(samples[row * count : (row + 1) * count])) for row, (prompt, _) in enumerate(requests)
        ]

    async def _draw(self, prompt: Prompt, index: int, seconds: float) -> Sample:
        async with self.places:
            began, versions = time.monotonic(), []
            for token in range(TOKENS):
                assert self.version is not None
                versions.append(self.version)
                await asyncio.sleep(max(0.0, began + seconds * (token + 1) / TOKENS - time.monotonic()))
        spans = tuple((at, made) for at, made in enumerate(versions) if at == 0 or versions[at - 1] != made)
        ids, logprobs = (5,) * TOKENS, (-1.0,) * TOKENS
        return Sample(prompt.id, index, prompt.token_ids, ids, logprobs, spans, "stop", f"#### {index}")


class TailEngine(EvenEngine):
    """One completion of each batch is ten times as long as the mean."""

    tail = TAIL


class TimedRank(FakeRankActor):
    """A step takes BATCH_SECONDS."""

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        time.sleep(BATCH_SECONDS - STEP_SECONDS)
        return super().step(batch, step)
