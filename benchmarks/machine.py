"""What this machine can do at best: matrix products bound training, memory bandwidth bounds decoding.

python benchmarks/machine.py THREADS   prints one JSON object
"""

import json
import os
import sys
import time
from collections.abc import Callable

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

REPEATS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The fastest of a few runs after a warm-up: what the hardware can do, not what it does while others use it."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def gflops(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """GFLOP/s of X[rows, inner] @ W[columns, inner].T, the shape of a linear layer."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return 2 * rows * inner * columns / best_seconds(lambda: torch.nn.functional.linear(x, weight)) / 1e9


def copy_gb_per_second(mebibytes: int = 1024) -> float:
    """Bytes read plus bytes written per second by a copy that fits no cache."""
    source = torch.ones(mebibytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source)) / 1e9


def read_gb_per_second(mebibytes: int = 1024) -> float:
    """Bytes read per second by a sum over what fits no cache. Decoding reads every weight for each token."""
    source = torch.ones(mebibytes * 2**18)
    return source.numel() * 4 / best_seconds(lambda: source.sum()) / 1e9


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    limits = {"threads": torch.get_num_threads(), "copy_gb_s": copy_gb_per_second(), "read_gb_s": read_gb_per_second()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        limits[f"gflops_{name}_2048"] = gflops(2048, 2048, 2048, dtype)
        limits[f"gflops_{name}_layer"] = gflops(2048, 576, 1536, dtype)  # a SmolLM2-135M layer in training
        limits[f"gflops_{name}_decode"] = gflops(32, 576, 1536, dtype)  # and with 32 rows, as in decoding
    print(json.dumps(limits))


if __name__ == "__main__":
    main()
