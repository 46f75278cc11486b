"""Weights that receivers read out of the sender's memory: the protocol, over memory that threads share.

What stands for a GPU's memory here is the process's own; tests/gpu has processes with CUDA IPC.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from grpo.config import Config
from grpo.errors import ClusterError, WeightSyncError
from grpo.types import Manifest
from grpo.weights import process_group, verify
from grpo.weights.shared_gpu import Handle, SharedGpuTransport
from grpo.weights.transport import choose_backend, make_transport
from tests.ranks import free_port
from tests.weights.test_process_group import some_tensors, within


class Shelf:
    """A `Memory` of one process. A broken one opens what it must not, or nothing."""

    held: dict[int, torch.UntypedStorage] = {}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.shown: list[int] = []
        self.opened = 0

    def show(self, storage: torch.UntypedStorage) -> Handle:
        if self.fault == "show":
            raise RuntimeError("CUDA error: operation not supported\nmore")
        Shelf.held[storage.data_ptr()] = storage
        self.shown.append(storage.data_ptr())
        return [storage.data_ptr()]

    def open(self, handle: Handle, device: torch.device) -> torch.Tensor:
        if self.fault == "open":
            raise RuntimeError("CUDA error: invalid resource handle")
        self.opened += 1
        found = torch.empty(0, dtype=torch.uint8).set_(Shelf.held[handle[0]])
        return torch.zeros_like(found) if self.fault == "zeros" else found


def meet(*memories: Shelf, strict: bool = False, seconds: float = 20) -> list[SharedGpuTransport]:
    port = free_port()

    def end(rank: int) -> SharedGpuTransport:
        where = "cpu", "127.0.0.1", port, rank, len(memories), "secret", seconds
        return SharedGpuTransport(*where, strict=strict, memory=memories[rank])

    with ThreadPoolExecutor(len(memories)) as pool:
        return list(pool.map(end, range(len(memories))))


def send(ends: list[SharedGpuTransport], version: int, tensors: Any, place: Any = process_group.nowhere) -> Any:
    with ThreadPoolExecutor(len(ends)) as pool:
        receiving = [pool.submit(lambda end=end: list(end.receive(place))) for end in ends[1:]]
        sent = Manifest(version, ends[0].send(version, tensors))
        return sent, [future.result() for future in receiving]


def test_receivers_copy_live_tensors_from_where_they_lie() -> None:
    flat = torch.arange(12.0)
    tensors = [("a", flat[:4].view(2, 2)), ("b", flat[4:]), ("empty", torch.zeros(0)), *some_tensors()]
    memories = [Shelf(), Shelf(), Shelf()]
    ends = meet(*memories)
    for version in (1, 2):
        flat.add_(version)
        sent, received = send(ends, version, tensors)
        for worker in received:
            assert [item for item, _ in worker] == list(sent.records)
            assert all(torch.equal(mine, got) for (_, mine), (_, got) in zip(tensors, worker, strict=True))
            pairs = [(mine, got) for (_, mine), (_, got) in zip(tensors, worker, strict=True) if got.numel()]
            assert all(mine.data_ptr() != got.data_ptr() for mine, got in pairs)
    assert memories[0].shown.count(flat.data_ptr()) == 1, "what stays is shown once"
    assert set(ends[0].seconds) == set(ends[1].seconds) == {"wire", "digest"}


def test_nothing_is_kept_for_having_been_shown() -> None:
    """Copies that somebody drops, and those that a transposed tensor needs, are gone with their last send."""
    ends = meet(Shelf(), Shelf())
    kept = torch.zeros(6)
    for version in range(1, 6):
        published = torch.full((1000,), float(version))
        send(ends, version, [("kept", kept), ("p", published), ("t", torch.ones(2, 3).t())])
        Shelf.held.clear()
        Shelf.held[kept.data_ptr()] = kept.untyped_storage()
    del published
    assert sum(not shown.expired() for shown, _ in ends[0].shown.values()) == 1
    assert ends[0].memory.shown.count(kept.data_ptr()) == 1  # type: ignore[attr-defined]


def test_a_transposed_tensor_is_copied_first_and_arrives_whole() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    _, [worker] = send(meet(Shelf(), Shelf()), 1, [("t", tensor)])
    assert worker[0][1].tolist() == tensor.tolist()


def test_they_are_copied_to_where_they_belong() -> None:
    home = torch.zeros(4)
    _, [worker] = send(meet(Shelf(), Shelf()), 1, [("w", torch.arange(4.0))], lambda *_: home)
    assert worker[0][1] is home and home.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_tensors_that_do_not_stay_go_through_one_place(monkeypatch: pytest.MonkeyPatch, bucket_bytes: int) -> None:
    monkeypatch.setattr(process_group, "BUCKET_BYTES", {"cpu": bucket_bytes})

    def passing() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.zeros(40)
        for number in range(5):
            yield f"t{number}", buffer[: 8 * (number + 1)].fill_(number + 1)
            buffer.fill_(-1)

    memories = [Shelf(), Shelf(), Shelf()]
    ends = meet(*memories)
    for version in (1, 2):
        sent, received = send(ends, version, passing())
        for worker in received:
            assert [tensor.tolist() for _, tensor in worker] == [[float(n)] * (8 * n) for n in range(1, 6)]
        verify(sent, [Manifest(version, tuple(item for item, _ in worker)) for worker in received])
    Shelf.held.clear()
    assert sum(not shown.expired() for shown, _ in ends[0].shown.values()) == 1, "however large it had to become"


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (("show", "", ""), "RuntimeError: CUDA error: operation not supported"),
        (("", "", "open"), "RuntimeError: CUDA error: invalid resource handle"),
        (("", "zeros", ""), "it holds something else"),
    ],
)
def test_where_one_end_cannot_all_go_through_the_host(
    faults: tuple[str, ...], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    memories = [Shelf(fault) for fault in faults]
    ends = meet(*memories)
    assert [end.in_place for end in ends] == [False] * 3
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 3 and sum(f"cannot be shared ({reason})" in line for line in told) >= 1
    before = [memory.opened for memory in memories]
    sent, received = send(ends, 1, some_tensors())
    verify(sent, [Manifest(1, tuple(item for item, _ in worker)) for worker in received])
    assert [memory.opened for memory in memories] == before


def test_ipc_by_name_is_refused_where_one_end_cannot() -> None:
    with pytest.raises(
        WeightSyncError,
        match=r"rank 0 of 2, gloo\) one cannot \(RuntimeError: CUDA error: invalid resource handle\); put them into",
    ):
        meet(Shelf(), Shelf("open"), strict=True)


def test_memory_that_changes_before_it_is_copied_is_found() -> None:
    """As by a trainer that goes on before all have read."""
    ends = meet(Shelf(), Shelf())
    opened = ends[1].memory.open
    ends[1].memory.open = lambda *given: opened(*given).clone().fill_(7)  # type: ignore[method-assign]
    sent, [worker] = send(ends, 1, [("w", torch.ones(64))])
    with pytest.raises(WeightSyncError, match="worker 0: w differs in digest"):
        verify(sent, [Manifest(1, tuple(item for item, _ in worker))])


def test_a_receiver_that_dies_before_it_has_copied_ends_the_sender() -> None:
    ends = meet(Shelf(), Shelf(), seconds=2)

    def dies(*_: Any) -> torch.Tensor:
        ends[1].close()
        raise ClusterError("gone")

    ends[1].memory.open = dies  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(within, 30, lambda: list(ends[1].receive()))
        with pytest.raises(ClusterError, match="broke off"):
            ends[0].send(1, some_tensors())
        assert isinstance(receiving.result(), ClusterError)


def test_a_sender_waits_until_all_have_copied() -> None:
    """Only then may its memory change."""
    ends = meet(Shelf(), Shelf(), Shelf(), seconds=1.5)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(within, 30, lambda: list(ends[1].receive()))
        with pytest.raises(ClusterError, match="took longer than deadlines.sync"):
            ends[0].send(1, some_tensors())
        assert isinstance(reading.result(), ClusterError)


@pytest.mark.parametrize(
    ("device", "given", "wanted"),
    [
        ("cuda", {}, ("nccl", "ipc")),
        ("cuda", {"train": {"gpus_per_rank": 0.5}, "rollout": {"gpus_per_engine": 0.5}}, ("ipc", "ipc")),
        ("cuda", {"cluster": {"colocate": True}}, ("ipc", "ipc")),
        ("cuda", {"cluster": {"colocate": True}, "sync": {"transport": "gloo"}}, ("gloo", "gloo")),
        ("cpu", {"cluster": {"colocate": True}}, ("gloo", "gloo")),
        ("cuda", {"sync": {"transport": "ipc"}}, ("ipc", "ipc")),
        ("cuda", {"sync": {"transport": "nccl"}}, ("nccl", "nccl")),
    ],
)
def test_who_shares_a_gpu_or_a_node_shares_its_memory(
    device: str, given: dict[str, Any], wanted: tuple[str, str]
) -> None:
    config = Config.model_validate({"model": {"path": "models/none"}, **given})
    assert tuple(choose_backend(config, device, near) for near in (False, True)) == wanted


@pytest.mark.parametrize(
    ("given", "strict"),
    [
        ({}, True),
        ({"sync": {"transport": "ipc"}, "cluster": {"colocate": True}}, True),
        ({"cluster": {"colocate": True}}, False),
    ],
)
def test_the_host_is_the_way_out_only_where_nccl_is_none(
    given: dict[str, Any], strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "grpo.weights.shared_gpu.SharedGpuTransport", lambda *where, strict: made.append((*where, strict))
    )
    config = Config.model_validate({"model": {"path": "models/none"}, "deadlines": {"sync": 7}, **given})
    make_transport(config, "cuda", "ipc://host:81", 1, 3, "secret")
    assert made == [("cuda", "host", 81, 1, 3, "secret", 7.0, strict)]
