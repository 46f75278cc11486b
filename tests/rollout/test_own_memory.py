"""What vLLM measures beside others on the same GPU: its own profiling, on a GPU whose memory is counted here."""

from types import SimpleNamespace
from typing import Any

import pytest

GIB = 2**30


class Gpu:
    """One GPU of 100 GiB: what this process's allocator holds, and what others do."""

    def __init__(self, own: int, others: int) -> None:
        self.own, self.peak, self.others = own, own, others

    def memory_reserved(self, _device: Any = None) -> int:
        return self.own

    def memory_stats(self, _device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.peak": self.peak, "allocated_bytes.all.current": self.own}

    def get_memory_info(self, _device: Any = None) -> tuple[int, int]:
        return 100 * GIB - self.own - self.others, 100 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("others_after", [60, 5], ids=["another engine takes its cache", "a rank gives memory back"])
def test_what_others_hold_counts_as_nothing(others_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.platforms import current_platform
    from vllm.utils import mem_utils

    from grpo.rollout.vllm_private import CONTEXT, own_memory

    gpu = Gpu(own=0, others=20 * GIB)
    for name in ("memory_reserved", "memory_stats", "get_memory_info"):
        monkeypatch.setattr(torch.accelerator, name, getattr(gpu, name), raising=False)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.accelerator, name, lambda *_: None, raising=False)
    monkeypatch.setattr(current_platform, "is_integrated_gpu", lambda *_: False, raising=False)
    snapshot = mem_utils.MemorySnapshot(device=torch.device("cpu"))
    gpu.own = gpu.peak = 3 * GIB  # the weights
    with own_memory(SimpleNamespace(init_snapshot=snapshot)):
        with mem_utils.memory_profiling(snapshot, weights_memory=3 * GIB) as found:
            gpu.peak, gpu.others = 7 * GIB, others_after * GIB
        assert snapshot.free_memory >= found.after_profile.free_memory  # vLLM refuses to start otherwise
    assert found.non_kv_cache_memory == 7 * GIB + CONTEXT
    assert snapshot.free_memory == 80 * GIB and torch.accelerator.get_memory_info()[0] == (97 - others_after) * GIB
