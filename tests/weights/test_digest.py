"""Digests of tensors."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.types import TensorRecord
from grpo.weights.digest import CHUNK, digest, record, records, sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.lists(st.floats(-3, 3, width=16), min_size=2, max_size=40), st.sampled_from(DTYPES), st.data())
@settings(max_examples=200)
def test_digest_sees_any_swap_and_any_change(values: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    first, second = data.draw(st.permutations(range(len(values))))[:2]
    swapped = tensor.clone()
    swapped[first], swapped[second] = tensor[second], tensor[first]
    same = bool(
        tensor[first].view(torch.int16 if dtype != torch.float32 else torch.int32)
        == swapped[first].view(torch.int16 if dtype != torch.float32 else torch.int32)
    )
    assert (digest(swapped) == digest(tensor)) == same
    changed = tensor.clone()
    changed[first] = changed[first] + 1
    assert digest(changed) != digest(tensor)


def test_digest_sees_rows_swapped_across_chunks_and_a_lost_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * CHUNK // 1024, 1024, generator=generator)
    assert len({digest(matrix), digest(matrix.flip(0)), digest(matrix.roll(CHUNK // 1024, 0)), digest(matrix.t())}) == 4
    cut = matrix.clone()
    cut[-1, -7:] = 0
    assert digest(cut) != digest(matrix)
    assert digest(matrix.clone()) == digest(matrix)


def test_digest_of_a_view_is_that_of_its_elements_in_order() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    assert digest(matrix.t()) == digest(matrix.t().contiguous()) != digest(matrix)


def test_records_of_many_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (0,), (CHUNK + 5,), (2, 2), (2 * CHUNK,), ()]
    tensors = [(f"t{place}", torch.randn(shape, generator=generator)) for place, shape in enumerate(shapes)]
    assert records(tensors, sums([tensor for _, tensor in tensors])) == [record(*each) for each in tensors]
    assert [each.digest for each in map(record, *zip(*tensors, strict=True))] == [digest(t) for _, t in tensors]
    assert records([], sums([])) == []


def test_digest_formula() -> None:
    """Two elements by hand: the plain sum of the bits, and the same bits times the odd weights of positions 1 and 2."""
    mask = (1 << 64) - 1

    def signed(value: int) -> int:
        value &= mask
        return value - (1 << 64) if value >> 63 else value

    golden = 0x9E3779B97F4A7C15
    weighted = 0
    for position, bits in ((1, 0x3F80), (2, 0x4000)):  # 1.0 and 2.0 in bfloat16
        mixed = signed(position * golden)
        mixed = signed((mixed ^ (mixed >> 31)) * golden)
        weighted += bits * ((mixed ^ (mixed >> 29)) | 1)
    expected = f"{0x3F80 + 0x4000:016x}{(weighted * golden) & mask:016x}"
    assert digest(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)) == expected


def test_record_of_a_scalar_and_of_nothing() -> None:
    assert record("s", torch.tensor(1.0)).shape == ()
    assert record("e", torch.empty(0, 3)) == TensorRecord("e", (0, 3), "float32", "")


def test_records_are_compared_whole() -> None:
    item = record("w", torch.ones(2))
    assert replace(item, digest="") != item


KERNEL = """
import torch
from grpo.weights import digest_kernel
from grpo.weights.digest import CHUNK, _bits, _by_torch
generator = torch.Generator().manual_seed(0)
whole = torch.randn(CHUNK + 70_001, generator=generator)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8):
    tensors = [whole.to(dtype), torch.empty(0, dtype=dtype), whole[:1].to(dtype), whole[3:5000].to(dtype)[1:]]
    found = digest_kernel.sum_all([_bits(tensor) for tensor in tensors])
    assert torch.equal(found, torch.cat([_by_torch(tensor) for tensor in tensors])), dtype
print("equal")
"""


def test_the_kernel_compiles_for_gpus() -> None:
    """For NVIDIA's from 8.0 on, which asks no GPU for anything. An interpreter takes what a compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from grpo.weights.digest_kernel import TYPES, _sum

    signature = {"addresses": "*i64", "counts": "*i64", "found": "*i64", "kind": "constexpr"}
    for capability, kind in [(80, TYPES[2]), (90, TYPES[1]), (90, TYPES[2]), (90, TYPES[4]), (90, TYPES[8])]:
        source = ASTSource(fn=_sum, signature=signature, constexprs={(3,): kind})
        assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.slow
def test_the_kernel_for_gpus_finds_the_same_sums_in_tritons_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "equal\n", done.stderr
