"""What types of GPU can do at most, by their makers' data sheets, and how much of it this code reaches."""

from dataclasses import dataclass

from grpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in GiB as the driver shows it; bytes a second of memory and of the link to the next GPU (one direction);
    dense FLOP/s in bfloat16 and float32."""

    memory_gib: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float


GPUS = {
    "A100-40": Gpu(40, 1.555e12, 312e12, 19.5e12, 300e9),
    "A100": Gpu(80, 2.039e12, 312e12, 19.5e12, 300e9),
    "L40S": Gpu(45, 0.864e12, 362e12, 91.6e12, 32e9),
    "H100": Gpu(80, 3.35e12, 989e12, 67e12, 450e9),
    "H200": Gpu(140, 4.8e12, 989e12, 67e12, 450e9),
    "B200": Gpu(179, 8.0e12, 2250e12, 80e12, 900e9),
}
"""A100, H100, H200 and B200 with NVLink (SXM); L40S with PCIe 4."""
DEFAULT = "H100"

# Shares of those limits. Measured: two H200, 1.54 billion parameters, 64 prompts x 8 completions (docs/performance.md).
TRAIN_SHARE = 0.30
"""Of the matrix peak, on forwarded tokens: 0.25 to 0.34 with completions of 200 tokens, 0.23 with 512."""
COMPILED_SHARE = 0.41
"""The same with compiled layers: 0.34 to 0.45 with 200 tokens, by the micro-batch, 0.43 with 512."""
ENGINE_TOKENS = 26_000.0
"""Tokens a second of one engine, whatever the GPU: its core is one Python thread (20 to 31 thousand, by the host)."""
SHARED_TOKENS = 40_000.0
"""Of several engines on one GPU together (36 to 42 thousand with two to four): what one runs, others wait for."""
DECODE_SHARE = 0.5
"""Of what memory and matrix units allow, where the GPU is slower than that thread. Assumed, not measured."""
LINK_SHARE = 0.5
"""Of a link, in the collectives of several ranks. Assumed, not measured."""
FIXED_SYNC = 0.07
"""Seconds of a sync whatever its size."""
SYNC_RATE, NEAR_SYNC_RATE = 16.5e9, 30e9
"""Bytes a second beyond that, of all engines on a GPU together: by NCCL (0.6 s for three times 3.1 GB), and through the
trainer's memory on one node (0.4 s)."""
RECEIVE_RATE, NEAR_RECEIVE_RATE = 2.0e9, 2.7e9
"""Bytes a second of weights that arrive beside sampling, likewise (4.7 and 3.5 s for three times 3.1 GB)."""
BESIDE = 0.75
"""By how much of the time in which weights travel by NCCL beside it training is longer: what sends them holds a part of
the GPU (3.9 of 4.7 s with completions of 200 tokens, 3.0 of 4.8 s with 512). Through memory it is not."""
FLOOR = 0.006
"""Seconds of a decoding step with few sequences in it: what the last ones of a batch cost. Assumed, not measured."""

HOST_LINK = 20e9
"""Bytes a second between host and GPU, either way: PCIe 4 x16. Assumed, not measured."""
CPU_ADAM = 1e9
"""Numbers a second that the CPU of a rank updates: 28 bytes each of its memory. Assumed, not measured on a server."""


def gpu_named(name: str) -> Gpu:
    """One of GPUS, however it is written. Raises ConfigError."""
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.strip().lower())
    if found is None:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, not {name!r}; name the nearest one and --gpu-gib")
    return found
