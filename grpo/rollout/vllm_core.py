"""What engines here add to vLLM's core, as it is in vLLM 0.32.0: see `vllm_private.py`, which loads it everywhere."""

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import Request

from grpo.rollout.holding import Held


class TellingCore(EngineCoreProc):
    """Methods that replace those of vLLM's core: of each step only what cannot wait is told. And one more verb."""

    held: Held
    probed: set[bytes]
    """Of each version so far, by what the prefix cache finds the first block of the probe."""

    def _attach_weight_version(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Called with what each step has made."""
        if not hasattr(self, "held"):
            scheduler: Any = self.scheduler
            self.held = Held(scheduler.requests)
        self.held.hold(outputs)
        for told in outputs.values():
            told.weight_version = self._weight_version

    def set_weight_version(self, weight_version: str) -> None:
        """Called while nothing runs: what is held was made by the version before."""
        if hasattr(self, "held"):
            for told in self.held.all(self._weight_version):
                self.output_queue.put_nowait(told)
        self._weight_version = weight_version

    def take_version(self, version: str, salt: str, prompts: list[list[int]], resume: bool) -> tuple[int, int]:
        """The model is of this version from now on, and requests have this salt.

        Returns how many requests run, and how many tokens of prompts the prefix cache would still give from older
        versions: of the first, the probe, those of a block that could have been kept under any earlier salt; of the
        others, those that it finds.
        """
        requests = [self._probe(tokens, salt) for tokens in prompts]
        if not hasattr(self, "probed"):
            self.probed = set()
        first = set(requests[0].block_hashes[:1]) if requests else set()
        scheduler: Any = self.scheduler
        running, manager = int(scheduler.get_num_unfinished_requests()), scheduler.kv_cache_manager
        kept = int(manager.coordinator.block_pool.hash_block_size) if first & self.probed else 0
        kept += sum(int(manager.get_computed_blocks(request)[1]) for request in requests[1:])
        self.probed |= first
        self.set_weight_version(version)
        if resume:
            self.resume_scheduler()
        return running, kept

    def _probe(self, tokens: list[int], salt: str) -> Request:
        params = SamplingParams(max_tokens=1)
        return Request("probe", tokens, params, None, cache_salt=salt, block_hasher=self.request_block_hasher)


for _name in ("_attach_weight_version", "set_weight_version", "take_version", "_probe"):
    setattr(EngineCoreProc, _name, getattr(TellingCore, _name))
