"""One vLLM engine: completes prompts, takes weights, and says which version of them made a sample.

The engine core runs in a child process, where requests and weights take turns. Once weights arrive, nothing is sampled
until `commit_weights` has dropped the prefix cache and stamped their version.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psutil

from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, DataError, DeadlineExceeded, WeightSyncError
from grpo.rollout.environment import may_fork, prepare_environment
from grpo.tokens import load_tokenizer
from grpo.types import Group, Manifest, Prompt, Sample, Sampling, TensorRecord

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.outputs import CompletionOutput

SHUTDOWN_SECONDS = 3.0


class RolloutEngine:
    """One engine on `device` ("cpu" or "cuda"). `start` builds it; all verbs belong to the event loop it ran on."""

    def __init__(self, config: Config, index: int, device: str) -> None:
        self.config, self.index, self.device = config, index, device
        self.requests = 0
        self.committed: int | None = None

    async def start(self) -> None:
        """Loads vLLM, starts the engine core and lets it load the model.

        Raises: ConfigError if the model cannot be loaded; ClusterError if the core does not start.
        """
        fork = may_fork(self.device)
        prepare_environment(self.config, self.device)
        gc.disable()  # these imports make so many objects that looking for garbage among them is a tenth of the time
        from grpo.rollout import build

        gc.freeze()
        gc.enable()
        self.build = build
        self.tokenizer = load_tokenizer(self.config)
        try:
            self.llm = build.start_engine(self.config, self.device, fork)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"vLLM must be able to load model.path = {self.config.model.path!r}, but: {one_line(error)}"
            ) from error
        except RuntimeError as error:
            raise ClusterError(f"engine {self.index} did not start: {one_line(error)}; its log says why") from error
        self.vocab_size = int(self.llm.model_config.get_vocab_size())
        self.stop_ids = build.stop_ids(self.tokenizer, self.llm.model_config)

    def pids(self) -> list[int]:
        """Pids of the processes that the engine started."""
        return [child.pid for child in psutil.Process().children(recursive=True)]

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        """G samples of each prompt, in the order of the prompts. A request is a prompt and the seed of its samples.

        `output_ids` end with the end token if one was sampled; `logprobs` are those of the sampled tokens, after
        temperature and top_p. Raises: DataError for a prompt that the model cannot take; WeightSyncError while there
        are no committed weights; DeadlineExceeded; ClusterError if the engine core died.
        """
        if self.committed is None:
            raise WeightSyncError(
                f"engine {self.index} samples only from committed weights, but holds none; sync and commit them first"
            )
        for prompt, _ in requests:
            self._check(prompt.id, prompt.token_ids, sampling.max_tokens)
        async with self._deadline("rollout", self.config.deadlines.rollout):
            calls = [
                self.complete(prompt.token_ids, self.build.sampling_params(sampling, seed, self.stop_ids))
                for prompt, seed in requests
            ]
            outputs = await asyncio.gather(*calls)
        return [
            Group(prompt, tuple(self._samples(prompt, output.outputs, sampling.samples_per_prompt)))
            for (prompt, _), output in zip(requests, outputs, strict=True)
        ]

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of a prompt's tokens 1..T-1 at temperature 1, under the weights last received, committed or not."""
        self._check("of the self-test", token_ids, 1)
        async with self._deadline("rollout", self.config.deadlines.rollout):
            output = await self.complete(token_ids, self.build.prompt_params())
        flat: Any = output.prompt_logprobs
        return [flat.logprobs[start] for start in flat.start_indices[1:]]

    async def complete(self, token_ids: Sequence[int], params: "SamplingParams") -> "RequestOutput":
        """vLLM's own answer to one request, unchecked and without a deadline."""
        self.requests += 1
        outputs = self.llm.generate(self.build.tokens(token_ids), params, str(self.requests))
        return [output async for output in outputs][-1]

    async def join_transfer(self, host: str, port: int, rank_offset: int, world_size: int) -> None:
        """Every worker joins the transfer group; the first as rank `rank_offset`. Raises: ClusterError."""
        await self._on_workers("join_transfer", self.config.model_dump_json(), host, port, rank_offset, world_size)

    async def receive_weights(self, version: int, records: tuple[TensorRecord, ...]) -> list[Manifest]:
        """Every worker loads what the trainer sends; what each received, with the digests of the received bytes.

        `records` is what the trainer announced. From here to the next commit the engine samples nothing.
        Raises: WeightSyncError if a tensor was not announced or not claimed, or a layer did not get all its weights.
        """
        self.committed = None
        expected = [[record.name, list(record.shape), record.dtype] for record in records]
        manifests = []
        for worker, (received, problems) in enumerate(await self._on_workers("receive_tensors", expected)):
            if problems:
                raise WeightSyncError(
                    f"engine {self.index} must load every tensor of version {version} and nothing else, but worker "
                    f"{worker}: {'; '.join(problems[:5])} ({len(problems)} in all); their models differ"
                )
            taken = tuple(TensorRecord(name, tuple(shape), dtype, digest) for name, shape, dtype, digest in received)
            manifests.append(Manifest(version, taken))
        return manifests

    async def commit_weights(self, version: int) -> None:
        """Drops everything computed under older weights and stamps `version` on all samples from now on.

        Call it only after the manifests were compared. Before any transfer it commits the weights of `model.path`.
        Raises: WeightSyncError if requests are still running.
        """
        async with self._deadline("weight sync", self.config.deadlines.sync):
            if not await self.llm.reset_prefix_cache():
                raise WeightSyncError(
                    f"engine {self.index} must drop its prefix cache with version {version}, but requests still use "
                    "it; wait for them before the sync"
                )
            await self.llm.update_weight_version(str(version))
        self.committed = version

    async def shutdown(self) -> None:
        """Ends the engine core and its workers, by force if they do not go by themselves."""
        children = psutil.Process().children(recursive=True)
        if hasattr(self, "llm"):
            self.llm.shutdown(timeout=SHUTDOWN_SECONDS)
        for child in psutil.wait_procs(children, timeout=SHUTDOWN_SECONDS)[1]:
            child.kill()

    def _check(self, name: str, token_ids: Sequence[int], room: int) -> None:
        """An id beyond the vocabulary or a prompt that is too long would end the engine core, so neither gets there."""
        limit = self.config.model.max_length - room
        if not 0 < len(token_ids) <= limit:
            raise DataError(
                f"a prompt must have 1 to {limit} tokens (model.max_length minus the completion's), but prompt {name} "
                f"has {len(token_ids)}; drop it or raise model.max_length"
            )
        wrong = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise DataError(
                f"token ids must be below the model's vocabulary of {self.vocab_size}, but prompt {name} has "
                f"{wrong[0]}; use the tokenizer that belongs to the model"
            )

    def _samples(self, prompt: Prompt, completions: "list[CompletionOutput]", count: int) -> Iterator[Sample]:
        completions = completions * (count // len(completions))  # vLLM makes one greedy completion: they are all alike
        texts = self.tokenizer.batch_decode([list(made.token_ids) for made in completions], skip_special_tokens=True)
        for index, (made, text) in enumerate(zip(completions, texts, strict=True)):
            if made.finish_reason not in ("stop", "length"):
                raise ClusterError(
                    f"a sample ends by stop or length, but engine {self.index} ended one of prompt {prompt.id} by "
                    f"{made.finish_reason}; its log says why"
                )
            flat: Any = made.logprobs
            assert list(flat.token_ids) == list(made.token_ids), "one logprob for each sampled token, in order"
            assert made.weight_versions, "vLLM stamps every sample"
            yield Sample(
                prompt_id=prompt.id,
                index=index,
                prompt_ids=prompt.token_ids,
                output_ids=tuple(made.token_ids),
                logprobs=tuple(flat.logprobs),
                version=int(made.weight_versions[0].version),
                finish_reason="stop" if made.finish_reason == "stop" else "length",
                text=text,
            )

    async def _on_workers(self, verb: str, *args: object) -> list[Any]:
        """One of the verbs of `receiver.py` on every worker of the engine."""
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self._deadline("weight sync", self.config.deadlines.sync):
            try:
                results: list[Any] = await self.llm.collective_rpc(verb, args=args)
            except EngineDeadError:
                raise
            except Exception as error:  # vLLM hands over a worker's exception as a text in a bare Exception
                raise ClusterError(f"engine {self.index}, {verb}: {one_line(error)}") from error
        return results

    @asynccontextmanager
    async def _deadline(self, phase: str, seconds: float) -> AsyncIterator[None]:
        """Turns a wait that takes too long and the death of the engine core into our own errors."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{phase} must end within {seconds:g} s (deadlines.*), but engine {self.index} has not answered; raise "
                "the deadline or look at its log"
            ) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise ClusterError(f"engine {self.index} died during {phase}: {error}; its log says why") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
