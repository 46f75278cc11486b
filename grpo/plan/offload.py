"""What `train.offload_*` takes off a GPU: bytes that it keeps, bytes that the host holds, seconds that this costs.

As DeepSpeed 0.19.8 lays it out; none of it was measured on a GPU. Stage 2 pins fp32 weights, gradients and one copy in
the model's precision; stage 3 pins sums of gradients and gradients. torch rounds what it pins up to a power
of 2.
"""

from grpo.config import Config
from grpo.config.train import Train

FP32, MOMENTS = 4, 8
MOST_LIVE = 10**9
"""Numbers of weights that stage 3 leaves on the GPU (stage3_max_live_parameters)."""
BUCKET = 5 * 10**8
"""Numbers of gradients that it collects there before ranks add them up (reduce_bucket_size)."""


def gpu_weights(train: Train, weights: int, size: int) -> int:
    """Bytes of weights on a rank's GPU, of so many in all with `size` bytes a number."""
    if train.offload_param == "cpu":
        return min(weights, MOST_LIVE * size)
    return weights // (train.ranks if train.zero_stage == 3 else 1)


def gpu_gradients(train: Train, trained: int, size: int) -> int:
    """Bytes of gradients there, of so many numbers that are trained."""
    if train.offload_optimizer == "cpu" and train.zero_stage == 3:
        return min(BUCKET, trained) * size
    return trained * FP32 // (train.ranks if train.zero_stage >= 2 else 1)


def host_bytes(train: Train, weights: int, trained: int, size: int) -> int:
    """What one rank then holds in host memory."""
    share, held = trained // train.ranks, 0
    if train.offload_optimizer == "cpu":
        held += MOMENTS * share
        if train.zero_stage == 3:
            held += FP32 * share + 2 * pinned(FP32 * share)
        else:
            held += 2 * pinned(FP32 * share) + pinned(size * share)
            held += FP32 * share if size == FP32 else 0  # sums of gradients, which else lie on the GPU
    if train.offload_param == "cpu":
        held += pinned(weights // train.ranks)
    return held


def pinned(size: int) -> int:
    """Bytes that torch takes to pin so many."""
    return 1 << (size - 1).bit_length() if size else 0


def offload_seconds(
    config: Config, parameters: int, size: int, micro_batches: int, ranks: int, adam: float, link: float
) -> float:
    """Of a step: the CPU's optimizer steps of `adam` numbers a second, and bytes over a link between host and GPU.

    An update takes gradients down and weights up; at stage 3 each micro-batch's gradients are added to a sum that comes
    up and goes down again, and offloaded weights come up for the forward and for the backward pass.
    """
    train, share = config.train, parameters / ranks
    updates, seconds = train.epochs * train.minibatches, 0.0
    if train.offload_optimizer == "cpu":
        moved = updates * (FP32 + size) * share
        if train.zero_stage == 3:
            moved += (2 * micro_batches - updates) * FP32 * share
        seconds += updates * share / adam + moved / link
    if train.offload_param == "cpu":
        seconds += 2 * micro_batches * size * share / link
    return seconds
