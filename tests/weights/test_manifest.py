"""What was sent against what was received."""

import subprocess
import sys

import pytest

from grpo.errors import WeightSyncError
from grpo.types import Manifest, TensorRecord
from grpo.weights import verify


def manifest(version: int = 3, **changes: TensorRecord | None) -> Manifest:
    records = {name: TensorRecord(name, (2, 3), "bfloat16", f"digest of {name}") for name in ("a", "b", "c")}
    merged = records | changes
    return Manifest(version, tuple(item for item in merged.values() if item is not None))


def test_equal_manifests_pass() -> None:
    verify(manifest(), [manifest(), manifest()])


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (manifest(b=None), "worker 1: b is missing"),
        (manifest(d=TensorRecord("d", (1,), "float32", "x")), "worker 1: d was never sent"),
        (
            manifest(b=TensorRecord("b", (3, 2), "bfloat16", "digest of b")),
            r"b differs in shape: sent \(2, 3\), received",
        ),
        (
            manifest(b=TensorRecord("b", (2, 3), "float32", "digest of b")),
            "b differs in dtype: sent bfloat16, received flo",
        ),
        (
            manifest(b=TensorRecord("b", (2, 3), "bfloat16", "zeros")),
            "b differs in digest: sent digest of b, received zer",
        ),
        (manifest(version=2), "worker 1: version 2 instead of 3"),
        (manifest(b2=TensorRecord("b", (2, 3), "bfloat16", "digest of b")), "worker 1: b appears 2 times"),
        (
            manifest(
                a=TensorRecord("a", (2, 3), "bfloat16", "digest of b"),
                b=TensorRecord("b", (2, 3), "bfloat16", "digest of a"),
            ),
            "a differs in digest.*b differs in digest",
        ),
    ],
)
def test_a_difference_is_an_error_that_names_the_tensor(received: Manifest, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        verify(manifest(), [manifest(), received])


def test_a_manifest_that_proves_nothing_is_an_error() -> None:
    empty = manifest(b=TensorRecord("b", (0, 3), "bfloat16", ""))
    with pytest.raises(WeightSyncError, match="sent b is empty; sent b has no digest"):
        verify(empty, [empty])
    with pytest.raises(WeightSyncError, match="none answered"):
        verify(manifest(), [])
    with pytest.raises(WeightSyncError, match="holds no tensor"):
        verify(Manifest(1, ()), [Manifest(1, ())])


def moved(version: int) -> Manifest:
    """The manifest of a policy that was trained since version 3."""
    return manifest(version, b=TensorRecord("b", (2, 3), "bfloat16", "digest of a trained b"))


def test_old_weights_under_a_new_number_are_an_error() -> None:
    verify(moved(4), [moved(4)], previous=manifest(3), updated=True)
    verify(manifest(4), [manifest(4)], previous=manifest(3), updated=False)  # every update was skipped
    with pytest.raises(WeightSyncError, match="the trainer has moved, but sent the weights of version 3 again"):
        verify(manifest(4), [manifest(4)], previous=manifest(3), updated=True)


def test_a_sync_that_covers_less_than_the_one_before_is_an_error() -> None:
    without = manifest(4, c=None)
    with pytest.raises(
        WeightSyncError, match="sent 2 tensors with 24 bytes, but version 3 was 3 tensors with 36 bytes"
    ):
        verify(without, [without], previous=manifest(3), updated=True)


def test_a_long_list_of_differences_is_cut() -> None:
    sent = Manifest(1, tuple(TensorRecord(f"t{i}", (1,), "float32", "x") for i in range(9)))
    with pytest.raises(WeightSyncError, match=r"t4 is missing; and 4 more") as caught:
        verify(sent, [Manifest(1, ())])
    assert "t5" not in str(caught.value)


def test_the_driver_compares_manifests_without_torch() -> None:
    code = "import sys; from grpo.weights import Transport, verify, make_transport; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
