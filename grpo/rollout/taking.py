"""How one vLLM engine takes weights: streamed into its model, or into a copy beside sampling that it switches to.

The engine core runs in a child process, where requests and weights take turns. Weights that are streamed let nothing be
sampled until `commit_weights` has stamped their version and proved that the prefix cache gives nothing of older ones.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, WeightSyncError
from grpo.rollout.core import EngineCore
from grpo.run.start import Phases
from grpo.types import Manifest, TensorRecord

if TYPE_CHECKING:
    from vllm import RequestOutput

LOOK_AHEAD_SECONDS = 0.02
"""Between two looks at whether weights have arrived beside sampling."""


class TakingEngine(EngineCore):
    """The verbs of a weight transfer, and what they leave behind for those that sample."""

    cache_probe_prompt: list[int]
    """A prompt of a whole block; empty where none can be that long: then the prefix cache finds nothing."""

    def __init__(
        self,
        config: Config,
        index: int,
        device: str,
        metrics: ModuleType | None = None,
        phases: Phases | None = None,
        together: int = 1,
    ) -> None:
        super().__init__(config, index, device, metrics, phases, together)
        self.received: int | None = None
        self.committed: int | None = None
        self.ahead: int | None = None  # the version in the copy beside the model
        self.transfers = 0
        self.switching = asyncio.Lock()
        self.salts = map(str, itertools.count())  # a version may come twice, with other weights
        self.last_prompt: Sequence[int] = ()
        self.drawing: set[asyncio.Task[RequestOutput]] = set()

    async def join_transfer(self, url: str, rank_offset: int, world_size: int, secret: str) -> None:
        """Every worker leaves its transfer group and joins another; the first as rank `rank_offset`.

        Raises: ClusterError; WeightSyncError if no weights can travel that way.
        """
        self.transfers += 1
        arguments = (self.config.model_dump_json(), url, rank_offset, world_size, secret)
        async with self.alone():
            problems = await self.on_workers("join_transfer", *arguments)
        for problem in filter(None, problems):
            raise WeightSyncError(problem)

    async def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> list[Manifest]:
        """Every worker takes what the trainer sends; what each received, with the digests of the received bytes.

        `records` is what the trainer announced. It is loaded at once, and from here to the next commit the engine
        samples nothing; if the transfer breaks off, the engine is stale: it refuses everything from then on, and only a
        new one helps. `ahead` it is taken into a copy beside sampling, which `commit_weights` loads; if that transfer
        breaks off, the copy is dropped, and a new transfer is needed.
        Raises: WeightSyncError if a tensor was not announced or not claimed, or a layer did not get all its weights;
        ClusterError if the transfer broke off; EngineLost, also if the engine is stale.
        """
        self._refuse_stale()
        expected = [[record.name, list(record.shape), record.dtype] for record in records]
        self.ahead = None
        if ahead:
            deadlines = self.config.deadlines  # the transfer has its own, which is the first to end
            async with self.deadline("weight sync", deadlines.sync + deadlines.health):
                answers = await self._receive_ahead(version, expected)
        else:
            self.committed = None
            async with self.alone():
                self.stale = f"the transfer of version {version} broke off"
                if self.asleep == "all":
                    await self._wake("weights", "cache")
                self.received = version
                answers = await self.on_workers("receive_tensors", expected)
                self.stale = None
        manifests = []
        for worker, (received, problems, seconds) in enumerate(answers):
            self._refuse(version, worker, problems)
            taken = tuple(TensorRecord(name, tuple(shape), dtype, digest) for name, shape, dtype, digest in received)
            manifests.append(Manifest(version, taken, seconds))
        self.ahead = version if ahead else None
        return manifests

    async def _receive_ahead(self, version: int, expected: Sequence[Sequence[object]]) -> list[Any]:
        """A transfer that takes its place ends it too, as its caller does not wait any more."""
        await self.on_workers("receive_ahead", version, expected)
        transfer = self.transfers
        while transfer == self.transfers:
            if None not in (answers := await self.on_workers("received_ahead")):
                return answers
            await asyncio.sleep(LOOK_AHEAD_SECONDS)
        raise ClusterError(f"engine {self.index} has left the transfer of version {version} for another")

    def _refuse(self, version: int, worker: int, problems: Sequence[str]) -> None:
        if problems:
            raise WeightSyncError(
                f"engine {self.index} must load every tensor of version {version} and nothing else, but worker "
                f"{worker}: {'; '.join(problems[:5])} ({len(problems)} in all); their models differ"
            )

    async def commit_weights(self, version: int, in_flight: bool = False) -> float:
        """Stamps `version` on all samples from now on, and loads it first if it was received ahead; seconds it took.

        Call it only after the manifests were compared; twice is as good as once. Before any transfer it commits the
        weights of `model.path`. No request may run, and it is proved that no later one finds what older weights have
        left in the prefix cache. `in_flight` requests go on with the new weights behind the tokens that they have, and
        those without one begin anew. A switch that breaks off leaves the engine stale, and ends its requests.
        Raises: WeightSyncError if requests are still running, if the cache was kept, if the copy is not what was
        received, or if another version was received last; EngineLost.
        """
        self._refuse_stale()
        began = time.perf_counter()
        if self.asleep == "all":
            raise WeightSyncError(
                f"engine {self.index} rests without weights, but was asked to commit version {version}; sync it first"
            )
        if self.ahead != version and self.received not in (None, version):
            raise WeightSyncError(
                f"engine {self.index} commits only what it received last, version {self.received}, but was asked for "
                f"version {version}; sync that version first"
            )
        if self.ahead == version and self.drawing and not in_flight:
            raise WeightSyncError(
                f"engine {self.index} takes version {version} between batches, but {len(self.drawing)} samples are "
                "being drawn; wait for them before the switch"
            )
        async with self.alone():
            if in_flight:
                await self._switch(version)
            else:
                await self._load_ahead(version)
                if self.asleep:
                    self.stale = "waking broke off"
                    await self._wake("kv_cache", "")
                self.stale = None
                await self._take(version, resume=False)
        return time.perf_counter() - began

    async def rest(self) -> None:
        """Gives the memory of its weights and cache back to the GPU; it samples nothing until others are committed.

        Raises: WeightSyncError if samples are being drawn; EngineLost, also if the engine is stale.
        """
        self._refuse_stale()
        if self.drawing:
            raise WeightSyncError(
                f"engine {self.index} rests between batches, but {len(self.drawing)} samples are being drawn; wait for "
                "them before the trainer's turn"
            )
        if self.asleep == "all":
            return
        async with self.alone():
            self.committed = None
            self.stale = "falling asleep broke off"
            if self.device == "cuda":
                await self.answer(self.llm.sleep(level=2))
            self.stale, self.asleep = None, "all"

    async def _wake(self, part: str, left: Literal["", "cache"]) -> None:
        """Takes the memory of a part; `left` is still away then. With all of it requests run again."""
        if self.device == "cuda":
            await self.answer(self.llm.wake_up([part]))
        self.asleep = left

    async def _switch(self, version: int) -> None:
        """Between two steps of the core, which has told of all tokens of the older weights by then."""
        from grpo.rollout.vllm_private import without_tokens

        async with self.switching:
            self.stale = f"the switch to version {version} broke off"
            try:
                await self.answer(self.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False))
                # They have the older salt. Who draws them asks again, and gets the new one.
                await self.answer(self.llm.abort(without_tokens(self.llm), internal=True))
                await self._load_ahead(version)
                await self._take(version, resume=True)
            except BaseException:
                for task in self.drawing:  # the core is paused, and stays so
                    task.cancel()
                raise
            self.stale = None

    async def _load_ahead(self, version: int) -> None:
        """Whatever fails in it leaves the engine stale."""
        if self.ahead != version:
            return
        self.committed = self.ahead = None
        self.stale = f"the switch to version {version} broke off"
        for worker, problems in enumerate(await self.on_workers("load_ahead", version)):
            self._refuse(version, worker, problems)
        self.received = version

    async def _take(self, version: int, resume: bool) -> None:
        """Stamps the version, and a new salt: nothing that older weights left in the prefix cache is found by it.

        The core proves it, with a probe and with a prompt of the last samples. Dropping the cache would take longer,
        the more memory it has.
        """
        salt = next(self.salts)
        prompts = [list(prompt) for prompt in (self.cache_probe_prompt, self.last_prompt) if prompt]
        call = self.llm.engine_core.call_utility_async("take_version", str(version), salt, prompts, resume)
        running, kept = await self.answer(call)
        if running:  # none while the core is paused
            raise WeightSyncError(
                f"engine {self.index} takes version {version} between batches, but {running} requests still run; wait "
                "for them before the sync"
            )
        if kept:
            raise WeightSyncError(
                f"engine {self.index} must hold nothing of older weights, but its prefix cache kept {kept} tokens "
                f"over the sync of version {version}; this vLLM does not keep salts apart, use the pinned one"
            )
        self.salt, self.committed = salt, version

    def _refuse_stale(self) -> None:
        if self.stale is not None:
            raise self._stale()

    def _stale(self) -> EngineLost:
        return EngineLost(f"engine {self.index} is stale: {self.stale}, and its model is in pieces; start a new engine")
