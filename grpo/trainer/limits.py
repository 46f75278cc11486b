"""How far trainer and sampler may differ before it is no rounding: by dtype, and by what rounding does to the model.

The noise is what the proof at start-up measured (`proof.py`). A user's own limit replaces the automatic one.
"""

from dataclasses import dataclass

from grpo.config import Config

LOOSEST = 0.2
"""Nats of the self-test beyond which an engine with other weights would pass."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All in nats. `tolerance`: of the self-test's mean difference; `mismatch`: of the samples' KL per token.

    A token that differs by more than `far` is wrong, or a rare accident of rounding: more than FAR_SHARE of them are
    none. The mean would not show a fault that only late tokens of long rows have.
    """

    tolerance: float
    mismatch: float
    far: float


FAR_SHARE = 0.01


def make_limits(config: Config, device: str, noise: float) -> Limits:
    """`noise`: mean difference that rounding makes. Kernels for float32 on GPUs may round their factors to TF32."""
    exact = config.model.dtype == "float32"
    floor = (0.02 if device == "cuda" else 0.002) if exact else 0.1
    tolerance = min(LOOSEST, floor + 4.0 * noise)
    mismatch = (1e-3 if exact else 0.05) + noise**2
    return Limits(
        tolerance=config.sync.tolerance or tolerance,
        mismatch=config.sync.max_mismatch or mismatch,
        far=max(0.1 if exact else 1.0, 20.0 * noise),
    )
