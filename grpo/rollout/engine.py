"""One vLLM engine: completes prompts, and says which version of the weights made a sample."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ClusterError, WeightSyncError
from grpo.rollout.samples import Words, check_prompt, make_samples
from grpo.rollout.taking import TakingEngine
from grpo.types import Group, Prompt, Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


class RolloutEngine(TakingEngine):
    """One engine on `device` ("cpu" or "cuda"). `start` builds it; all verbs belong to the event loop it ran on."""

    async def start(self) -> None:
        """Starts the engine core and lets it load the model; it raises what failed as it is."""
        await super().start()
        self.tokenizer = load_tokenizer(self.config)
        self.stop_ids = self.build.stop_ids(self.tokenizer, self.llm.model_config)
        self.words = Words(self.tokenizer, self.stop_ids, self.config.rollout.skip_special_tokens)
        self.vocab_size = int(self.llm.model_config.get_vocab_size())
        self.cache_probe_prompt = self.build.cache_probe_prompt(self.llm.vllm_config)
        self.slots = asyncio.Semaphore(self.build.sample_slots(self.llm.vllm_config))

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        """G samples of each prompt, in the order of the prompts. A request is a prompt and the seed of its samples.

        Sample i is drawn with seed `seed + i`; its tokens and logprobs depend on nothing else that the engine does.
        `output_ids` end with the end token if one was sampled; `logprobs` are those of the sampled tokens, after
        temperature and top_p. Raises: DataError for a prompt that the model cannot take; WeightSyncError while there
        are no committed weights; EngineLost if the engine core died, has not answered within `deadlines.rollout`, or
        has become stale.
        """
        await self._switched()
        self._refuse_stale()
        if self.committed is None:
            raise WeightSyncError(
                f"engine {self.index} samples only from committed weights, but holds none; sync and commit them first"
            )
        longest = self.config.model.max_length - sampling.max_tokens
        for prompt, _ in requests:
            check_prompt(prompt.id, prompt.token_ids, longest, self.vocab_size)
        count = sampling.samples_per_prompt
        drawn = count if sampling.temperature > 0 else 1  # greedy samples are all the same
        self.last_prompt = max((prompt.token_ids for prompt, _ in requests), key=len, default=())
        async with self.deadline("rollout", self.config.deadlines.rollout):
            calls = [
                self._draw(
                    prompt, self.build.sampling_params(sampling, seed + number, self.stop_ids, self.config.rollout.stop)
                )
                for prompt, seed in requests
                for number in range(drawn)
            ]
            outputs = await self._all(calls)
        return [
            Group(prompt, make_samples(prompt, outputs[row * drawn : (row + 1) * drawn], count, self.words))
            for row, (prompt, _) in enumerate(requests)
        ]

    async def abandon(self) -> None:
        """Drops all that `generate` is sampling: those calls fail with ClusterError. Returns once vLLM knows."""
        dropped = list(self.drawing)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)

    async def _all(self, draws: "Sequence[Coroutine[Any, Any, RequestOutput]]") -> "list[RequestOutput]":
        """The outputs of all, in order; if one fails or is dropped, none goes on."""
        tasks = [asyncio.ensure_future(draw) for draw in draws]
        self.drawing.update(tasks)
        try:
            return await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            here = asyncio.current_task()
            if here and here.cancelling():
                raise
            if self.stale is not None:
                raise self._stale() from None
            raise ClusterError(f"engine {self.index} has dropped its requests, as it was told") from None
        finally:
            for task in tasks:
                task.cancel()
            self.drawing.difference_update(tasks)

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of a prompt's tokens 1..T-1 at temperature 1, under the weights last received, committed or not."""
        self._refuse_stale()
        check_prompt("of the self-test", token_ids, self.config.model.max_length - 1, self.vocab_size)
        async with self.deadline("rollout", self.config.deadlines.rollout):
            output = await self.complete(token_ids, self.build.prompt_params())
        flat: Any = output.prompt_logprobs
        return [flat.logprobs[start] for start in flat.start_indices[1:]]

    async def _draw(self, prompt: Prompt, params: "SamplingParams") -> "RequestOutput":
        """One sample. vLLM's own queue stays empty: a health check would have to wait in it.

        What it finds in the prefix cache is of the weights that its salt stands for, so they must make its first token:
        a request that has waited over a switch, which may have dropped it, is asked again.
        """
        async with self.slots:
            while True:
                await self._switched()
                salt, version = self.salt, self.committed
                output = await self.complete(prompt.token_ids, params)
                await self._switched()
                made = output.outputs[0]
                first = made.weight_versions[0].version if made.weight_versions else None
                if self.salt == salt or first == str(version):
                    return output

    async def _switched(self) -> None:
        """Returns once no switch is under way."""
        async with self.switching:
            pass
