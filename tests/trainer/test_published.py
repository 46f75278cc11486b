"""Copies of the weights that travel beside the training."""

import threading
from collections.abc import Iterator

import pytest
import torch

from grpo.errors import WeightSyncError
from grpo.trainer.published import PublishedVersions

LIVE = {"embed": torch.zeros(4, 8), "head": torch.zeros(8, dtype=torch.bfloat16)}
SIZE = sum(tensor.nbytes for tensor in LIVE.values())


def live(value: float) -> Iterator[tuple[str, torch.Tensor]]:
    """As the trainer yields them: each is overwritten once the next is asked for."""
    for name, tensor in LIVE.items():
        yield name, tensor.fill_(value)
        tensor.fill_(-1.0)


def publish(versions: PublishedVersions, version: int, oldest: int) -> int:
    return versions.publish(version, oldest, live(version), SIZE, stepped=True)


def sent(versions: PublishedVersions, version: int) -> dict[str, float]:
    with versions.sending(version) as tensors:
        return {name: tensor.flatten()[0].item() for name, tensor in tensors}


@pytest.fixture
def versions() -> PublishedVersions:
    return PublishedVersions(torch.device("cpu"))


def test_what_is_sent_is_what_was_published_in_its_order(versions: PublishedVersions) -> None:
    assert [publish(versions, version, 0) for version in (0, 1, 2)] == [SIZE, 2 * SIZE, 3 * SIZE]
    for version in (2, 0, 1):
        assert list(sent(versions, version).items()) == [("embed", version), ("head", version)]
    with versions.sending(1) as tensors:
        assert [tensor.dtype for _, tensor in tensors] == [torch.float32, torch.bfloat16]


def test_a_version_that_is_not_held_is_refused_by_name(versions: PublishedVersions) -> None:
    publish(versions, 3, 0)
    publish(versions, 5, 4)
    for version in (3, 4):
        with pytest.raises(WeightSyncError, match=rf"but {version} is none of \[5\]"):
            sent(versions, version)


def test_memory_of_forgotten_versions_takes_the_next(versions: PublishedVersions) -> None:
    places = set()
    for version in range(10):
        assert publish(versions, version, version - 1) <= 2 * SIZE
        with versions.sending(version) as tensors:
            places |= {tensor.data_ptr() for _, tensor in tensors}
    assert len(places) == 2 * len(LIVE)


def test_a_version_that_travels_is_not_overwritten_though_forgotten(versions: PublishedVersions) -> None:
    publish(versions, 1, 0)
    with versions.sending(1) as tensors:
        travelling = iter(tensors)
        assert next(travelling)[1].flatten()[0] == 1.0
        assert publish(versions, 2, 2) == 2 * SIZE, "what travels still takes memory"
        assert next(travelling)[1].flatten()[0] == 1.0
    assert publish(versions, 3, 3) == SIZE
    assert sent(versions, 3) == {"embed": 3.0, "head": 3.0}


def test_a_version_that_is_published_again_while_it_travels_keeps_both(versions: PublishedVersions) -> None:
    publish(versions, 1, 0)
    with versions.sending(1) as tensors:
        publish(versions, 1, 1)
        assert [tensor.flatten()[0].item() for _, tensor in tensors] == [1.0, 1.0]
    assert sent(versions, 1) == {"embed": 1.0, "head": 1.0}


def test_the_sending_thread_computes_with_one_core_and_the_training_one_keeps_its_own(
    versions: PublishedVersions,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []

    def send() -> None:
        with versions.sending(1):
            seen.append(torch.get_num_threads())

    publish(versions, 1, 0)
    try:
        thread = threading.Thread(target=send)
        thread.start()
        thread.join()
        assert seen == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_live_tensors_that_stay_are_copied_together(versions: PublishedVersions) -> None:
    here = [(name, torch.full_like(tensor, 4.0)) for name, tensor in LIVE.items()]
    assert versions.publish(4, 0, here, SIZE, stepped=True) == SIZE
    for _, tensor in here:
        tensor.fill_(5.0)
    assert sent(versions, 4) == {"embed": 4.0, "head": 4.0}


def test_a_failed_copy_is_no_version(versions: PublishedVersions) -> None:
    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield from live(1)
        raise RuntimeError("a collective broke")

    publish(versions, 0, 0)
    with pytest.raises(RuntimeError):
        versions.publish(1, 0, breaks(), SIZE, stepped=True)
    assert sent(versions, 0) == {"embed": 0.0, "head": 0.0}
    with pytest.raises(WeightSyncError, match=r"1 is none of \[0\]"):
        sent(versions, 1)
