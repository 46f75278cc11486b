"""CUDA IPC between processes: on one GPU, and between two of which each process sees one alone, as actors of Ray do."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from grpo.types import Manifest, TensorRecord
from grpo.weights import verify
from tests.ranks import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPE, VERSIONS = (1024, 1024), 3


def end(rank: int, port: int, gpu: str, live: bool) -> list[tuple[tuple[TensorRecord, ...], list[float]]]:
    """What was sent or received, version by version, and a number of each tensor."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from grpo.weights.digest import has_kernel
    from grpo.weights.shared_gpu import SharedGpuTransport

    transport = SharedGpuTransport("cuda", "127.0.0.1", port, rank, 3, "secret", 60.0, strict=True)
    assert has_kernel(transport.device), "digests are made by the kernel"
    flat = torch.zeros(4 * SHAPE[0] * SHAPE[1], device="cuda", dtype=torch.bfloat16)
    views = [(f"t{number}", part.view(SHAPE)) for number, part in enumerate(flat.chunk(4))]
    found = []
    for version in range(1, VERSIONS + 1):
        if rank == 0:
            for number, (_, view) in enumerate(views):
                view.fill_(version + number / 4)
            sent = transport.send(version, views if live else iter(views))
            found.append((tuple(sent), [version + number / 4 for number in range(4)]))
        else:
            received = list(transport.receive())
            assert all(bool((tensor == tensor[0, 0]).all()) for _, tensor in received)
            found.append((tuple(item for item, _ in received), [float(tensor[0, 0]) for _, tensor in received]))
    transport.close()
    return found


def meet(gpus: tuple[str, str, str], live: bool) -> None:
    port, pool = free_port(), ProcessPoolExecutor(3, mp_context=get_context("spawn"))
    sent, *received = [
        future.result(240) for future in [pool.submit(end, rank, port, gpus[rank], live) for rank in range(3)]
    ]
    for version, (records, values) in enumerate(sent, start=1):
        verify(Manifest(version, records), [Manifest(version, worker[version - 1][0]) for worker in received])
        assert [worker[version - 1][1] for worker in received] == [values, values]


@pytest.mark.parametrize("live", [True, False], ids=["where they lie", "one after the other"])
def test_on_one_gpu(live: bool) -> None:
    meet(("0", "0", "0"), live)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("live", [True, False], ids=["where they lie", "one after the other"])
def test_from_a_gpu_that_the_receiver_does_not_see(live: bool) -> None:
    meet(("1", "0", "0"), live)
