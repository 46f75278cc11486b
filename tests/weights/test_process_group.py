"""The weight transfer without an engine: the stream over gloo, and groups that break."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import Config
from grpo.errors import ClusterError, WeightSyncError
from grpo.types import Manifest, TensorRecord
from grpo.weights import group as groups
from grpo.weights import process_group, verify
from grpo.weights.process_group import GroupTransport
from grpo.weights.transport import choose_backend, make_sender, make_transport
from tests.group_ranks import GROUP_SECONDS, TENSORS, GroupRank
from tests.ranks import free_port


def here(port: int) -> tuple[str, str, str, int]:
    return "gloo", "cpu", "127.0.0.1", port


def open_group(
    world_size: int, kind: type[GroupTransport] = GroupTransport, seconds: float = 20
) -> list[GroupTransport]:
    """All ranks of one group, each made in its own thread; rank 0 is of class `kind`."""
    port = free_port()
    with ThreadPoolExecutor(world_size) as pool:
        made: list[Future[GroupTransport]] = [
            pool.submit(kind if rank == 0 else GroupTransport, *here(port), rank, world_size, "secret", seconds)
            for rank in range(world_size)
        ]
        return [future.result() for future in made]


def transfer(
    group: list[GroupTransport], tensors: Any
) -> tuple[Manifest, list[list[tuple[TensorRecord, torch.Tensor]]]]:
    with ThreadPoolExecutor(len(group)) as pool:
        received = [pool.submit(lambda end=end: list(end.receive())) for end in group[1:]]
        sent = Manifest(7, group[0].send(7, tensors))
        return sent, [future.result() for future in received]


def some_tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        ("bias", torch.randn(3, generator=generator).to(torch.bfloat16)),  # 6 bytes: the next one must still be aligned
        ("matrix", torch.randn(5, 7, generator=generator)),
        ("scalar", torch.tensor(2.5, dtype=torch.float16)),
        ("transposed", torch.randn(4, 6, generator=generator).t()),
        ("last", torch.randn(300, generator=generator)),
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_every_worker_receives_what_was_sent(monkeypatch: pytest.MonkeyPatch, bucket_bytes: int) -> None:
    monkeypatch.setattr(process_group, "BUCKET_BYTES", {"cpu": bucket_bytes})
    tensors = some_tensors()
    sent, received = transfer(open_group(3), iter(tensors))
    assert [item.name for item in sent.records] == ["bias", "matrix", "scalar", "transposed", "last"]
    for worker in received:
        assert [item for item, _ in worker] == list(sent.records)
        for (_, mine), (_, theirs) in zip(tensors, worker, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    verify(sent, [Manifest(7, tuple(item for item, _ in worker)) for worker in received])


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 20])
def test_tensors_travel_from_where_they_lie_to_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """As between GPUs: no copy on the way, and the digest is that of the place."""
    monkeypatch.setattr(process_group, "PART_BYTES", part_bytes)
    monkeypatch.setattr(process_group, "HEAD_BYTES", 64)
    monkeypatch.setattr(GroupTransport, "in_place", True)
    tensors = some_tensors()
    homes = {name: torch.full_like(tensor, 9).contiguous() for name, tensor in tensors if name != "matrix"}
    sender, first, second = open_group(3)

    def place(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        home = homes.get(name)
        assert home is None or (home.shape, home.dtype) == (torch.Size(shape), dtype)
        return home

    for version in (1, 2):
        tensors[1][1].add_(version)
        with ThreadPoolExecutor(2) as pool:
            receiving = [pool.submit(lambda: list(first.receive(place))), pool.submit(lambda: list(second.receive()))]
            sent = sender.send(version, tensors)
            received = [future.result() for future in receiving]
        for worker in received:
            assert [item for item, _ in worker] == list(sent)
            assert all(torch.equal(mine, got) for (_, mine), (_, got) in zip(tensors, worker, strict=True))
        assert [tensor is homes.get(item.name) for item, tensor in received[0]] == [True, False, True, True, True]
        assert set(sender.seconds) == set(first.seconds) == {"wire", "digest"}


def test_a_place_is_filled_from_a_bucket_too() -> None:
    home = torch.zeros(4)
    sender, receiver = open_group(2)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: list(receiver.receive(lambda *_: home)))
        [sent] = sender.send(1, iter([("w", torch.arange(4.0))]))
        [(taken, tensor)] = receiving.result()
    assert tensor is home and home.tolist() == [0, 1, 2, 3] and taken == sent


def test_a_group_carries_one_version_after_another() -> None:
    group = open_group(2)
    for value in (1.0, 2.0, 3.0):
        _, [worker] = transfer(group, [("w", torch.full((4,), value))])
        assert worker[0][1].tolist() == [value] * 4


def test_a_tensor_may_be_freed_before_the_next_is_asked_for() -> None:
    def reused_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.zeros(4)
        for number in range(3):
            yield f"t{number}", buffer.fill_(number + 1)
            buffer.fill_(-1)

    sent, [worker] = transfer(open_group(2), reused_buffer())
    assert [tensor.tolist() for _, tensor in worker] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    verify(sent, [Manifest(7, tuple(item for item, _ in worker))])


def test_a_sender_of_several_groups_sends_the_same_to_all_and_leaves_all() -> None:
    """As where engines share GPUs: each group holds every GPU once."""
    config = Config.model_validate({"model": {"path": "models/none"}, "deadlines": {"sync": 20}})
    doors = [(f"gloo://127.0.0.1:{free_port()}", size, f"secret {size}") for size in (3, 2)]
    tensors = some_tensors()
    with ThreadPoolExecutor(4) as pool:
        joining = [
            pool.submit(make_transport, config, "cpu", url, rank, size, secret)
            for url, size, secret in doors
            for rank in range(1, size)
        ]
        sender = pool.submit(make_sender, config, "cpu", doors).result()
        ends = [future.result() for future in joining]
        for version in (1, 2):
            receiving = [pool.submit(lambda end=end: list(end.receive())) for end in ends]
            sent = Manifest(version, sender.send(version, iter(tensors)))
            received = [future.result() for future in receiving]
            assert len(received) == 3
            for worker in received:
                assert all(torch.equal(mine, got) for (_, mine), (_, got) in zip(tensors, worker, strict=True))
            verify(sent, [Manifest(version, tuple(item for item, _ in worker)) for worker in received])
        waiting = [pool.submit(within, 30, lambda end=end: list(end.receive())) for end in ends]
        sender.close()
        assert all(isinstance(future.result(), ClusterError) for future in waiting)


def test_a_receiver_that_leaves_one_group_ends_the_sender_of_all() -> None:
    config = Config.model_validate({"model": {"path": "models/none"}, "deadlines": {"sync": 5}})
    doors = [(f"gloo://127.0.0.1:{free_port()}", 2, f"secret {lane}") for lane in range(2)]
    with ThreadPoolExecutor(3) as pool:
        joining = [pool.submit(make_transport, config, "cpu", url, 1, size, secret) for url, size, secret in doors]
        sender = pool.submit(make_sender, config, "cpu", doors).result()
        first, second = (future.result() for future in joining)
        reading = pool.submit(within, 30, lambda: list(first.receive()))
        second.close()
        with pytest.raises(ClusterError, match="broke off"):
            sender.send(1, iter(some_tensors()))
        assert isinstance(reading.result(), ClusterError), "nobody waits for a sender that is gone"


class Zeroing(GroupTransport):
    def _buckets(self, tensors: Any) -> Any:
        for bucket in super()._buckets(tensors):
            if len(bucket) > 1:  # the first holds one tensor
                bucket[0][1].zero_()
            yield bucket


class Swapping(GroupTransport):
    def _buckets(self, tensors: Any) -> Any:
        for bucket in super()._buckets(tensors):
            if len(bucket) > 1:
                (first, data), (second, other) = bucket
                bucket = [(first, other), (second, data)]
            yield bucket


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Zeroing, "^.*worker 0: b differs in digest[^;]*; nothing"), (Swapping, "b differs.*c differs")],
)
def test_data_that_changes_on_the_way_is_found(kind: type[GroupTransport], message: str) -> None:
    tensors = [("a", torch.randn(4, 4)), ("b", torch.randn(4, 4)), ("c", torch.randn(4, 4))]
    sent, [worker] = transfer(open_group(2, kind), tensors)
    with pytest.raises(WeightSyncError, match=message):
        verify(sent, [Manifest(7, tuple(item for item, _ in worker))])


def within(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """The error of a call that must end in time."""
    caught: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            caught.append(None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert caught, f"still waiting after {seconds} s"
    return caught[0]


def test_a_place_that_is_not_filled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is not that of what came, but of what is there."""
    monkeypatch.setattr(GroupTransport, "in_place", True)
    sender, receiver = open_group(2)
    started = receiver._start

    def elsewhere(tensors: Any) -> Any:
        return started([tensor.clone() if tensor.numel() == 64 else tensor for tensor in tensors])

    monkeypatch.setattr(receiver, "_start", elsewhere)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: list(receiver.receive(lambda _, shape, dtype: torch.zeros(shape, dtype=dtype))))
        sent = Manifest(7, sender.send(7, [("a", torch.ones(4, 4)), ("b", torch.ones(3))]))
        received = Manifest(7, tuple(item for item, _ in receiving.result()))
    with pytest.raises(WeightSyncError, match="worker 0: a differs in digest[^;]*; nothing"):
        verify(sent, [received])


def test_a_sender_that_stops_is_an_error_of_the_receiver() -> None:
    _sender, receiver = open_group(2, seconds=1)
    error = within(60, lambda: list(receiver.receive()))
    assert isinstance(error, ClusterError) and "broke off" in str(error) and "rank 1 of 2" in str(error)


def test_a_transfer_has_one_deadline_however_often_something_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that trickles: no wait of its receiver is longer than a third of the deadline."""
    monkeypatch.setattr(process_group, "BUCKET_BYTES", {"cpu": 1})
    sender, receiver = open_group(2)
    sender.timeout = receiver.timeout = timedelta(seconds=1.5)
    got: list[str] = []

    def trickle() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(20):
            time.sleep(0.5)
            yield f"t{number}", torch.ones(3)

    def receive() -> None:
        for item, _ in receiver.receive():
            got.append(item.name)

    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive)
        with pytest.raises(ClusterError, match=r"took longer than deadlines.sync = 1.5 s"):
            sender.send(1, trickle())
        with pytest.raises(ClusterError, match="broke off"):
            receiving.result(timeout=60)
    assert len(got) < 6
    assert transfer(open_group(2, seconds=60), [("w", torch.ones(2))])[0].version == 7


def test_a_receiver_that_is_gone_is_an_error_of_the_sender() -> None:
    sender, receiver = open_group(2, seconds=1)
    receiver.close()
    error = within(60, lambda: sender.send(1, [("w", torch.randn(1 << 20))]))
    assert isinstance(error, ClusterError)


def test_a_rank_that_never_joins_is_an_error() -> None:
    error = within(60, lambda: GroupTransport("gloo", "cpu", "127.0.0.1", free_port(), 0, 2, "secret", seconds=1))
    assert isinstance(error, ClusterError) and "must join" in str(error)


@pytest.mark.slow
def test_the_ranks_that_are_left_form_a_new_group() -> None:
    """Killed in the middle of a sync: a receiver, then three times the sender. The others fail at once, and go on."""
    ranks = [GroupRank() for _ in range(3)]
    try:
        for victim, sent in ((2, 10), (0, 1), (0, TENSORS // 2), (0, TENSORS - 1)):
            left = [rank for rank in range(3) if rank != victim]
            join(ranks, pause=sent)
            assert ranks[0].answer() == "paused"
            ranks[victim].process.kill()
            if victim != 0:
                ranks[0].pipe.send("go on")
            for rank in left:
                assert "broke off" in ranks[rank].answer(GROUP_SECONDS / 2)
            ranks[victim] = GroupRank()
        join(ranks, pause=None)
        assert [rank.answer() for rank in ranks] == [TENSORS] * 3
    finally:
        for item in ranks:
            item.process.kill()
            item.process.join()


def join(ranks: list[GroupRank], pause: int | None) -> None:
    port = free_port()
    for place, item in enumerate(ranks):
        item.pipe.send((port, place, pause))


def test_a_group_that_was_left_says_so() -> None:
    sender, receiver = open_group(2)
    for end in (sender, receiver):
        end.close()
        end.close()
    with pytest.raises(ClusterError, match=r"rank 0 of 2, gloo\) was left; join a new one"):
        sender.send(1, some_tensors())
    with pytest.raises(ClusterError, match="rank 1 of 2, gloo"):
        list(receiver.receive())


def test_tensors_that_cannot_be_made_end_the_sync_of_all_ranks() -> None:
    """The trainer fails while it sends: the workers need not wait for their deadline."""

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        yield "b", torch.ones(3)
        raise ValueError("no more")

    sender, receiver = open_group(2)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: list(receiver.receive()))
        with pytest.raises(ValueError, match="no more"):
            sender.send(1, failing())
        with pytest.raises(ClusterError, match="broke off"):
            receiving.result(timeout=60)


def test_the_fault_point_lies_behind_the_first_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRPO_FAULTS", "sync.tensor@7:raise")
    monkeypatch.setenv("GRPO_FAULT_DIR", str(tmp_path))
    sender, receiver = open_group(2)
    received = []

    def receive() -> None:
        for item, _ in receiver.receive():
            received.append(item.name)

    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive)
        with pytest.raises(OSError, match="fault point"):
            sender.send(7, some_tensors())
        with pytest.raises(ClusterError, match="broke off"):
            receiving.result(timeout=60)
    assert received == ["bias"]


class Silent:
    """A group whose collectives do nothing and say so to nobody, as a communicator that switched itself off."""

    def broadcast(self, *_: object) -> "Silent":
        return self

    allreduce = broadcast

    def abort(self) -> None: ...

    def wait(self, *_: object) -> None: ...


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_moves_no_data_is_refused_on_both_ends(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(groups, "_met", lambda *_: nullcontext())
    monkeypatch.setattr(groups, "_form", lambda *_: Silent())
    with pytest.raises(WeightSyncError, match="must reach all ranks .* set sync.transport to gloo"):
        GroupTransport("nccl", "cpu", "127.0.0.1", 1, rank, 2, "secret", seconds=1)


@pytest.mark.parametrize(
    ("changes", "on_cuda", "on_cpu"),
    [
        ({}, "nccl", "gloo"),
        ({"rollout": {"gpus_per_engine": 0.5}, "train": {"gpus_per_rank": 0.5}}, "ipc", "gloo"),
        ({"rollout": {"gpus_per_engine": 2}}, "nccl", "gloo"),
        ({"rollout": {"engines": 2, "engines_per_gpu": 2}}, "nccl", "gloo"),
        ({"train": {"gpus_per_rank": 0.5}}, "ipc", "gloo"),
        ({"sync": {"transport": "gloo"}}, "gloo", "gloo"),
        ({"sync": {"transport": "nccl"}, "rollout": {"gpus_per_engine": 0.5}}, "nccl", "nccl"),
    ],
)
def test_backends(changes: dict[str, object], on_cuda: str, on_cpu: str) -> None:
    config = Config.model_validate({"model": {"path": "models/none"}} | changes)
    assert (choose_backend(config, "cuda", False), choose_backend(config, "cpu", False)) == (on_cuda, on_cpu)
