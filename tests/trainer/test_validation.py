import math

import pytest

from grpo.errors import WeightSyncError
from grpo.trainer.limits import Limits
from grpo.trainer.validation import check_mismatch
from tests.models import random_samples
from tests.runs import make_config

LIMITS = Limits(tolerance=0.1, mismatch=0.005, far=1.0)
ROWS = random_samples(2, advantages=(1.0,))  # of version 0
ROUNDING = math.sqrt(2 * 0.005)


def check(step: int, drift: float | None, kl: float = 0.0, far: float = 0.0, apart: float = 0.0) -> None:
    found = {"rollout_kl": kl, "rollout_far": far, "rollout_abs_diff_bounded": apart}
    check_mismatch(found, ROWS, step, make_config(), LIMITS, drift)


def test_samples_of_the_newest_weights_are_held_to_rounding():
    check(1, None, kl=0.005, far=0.01, apart=9.0)
    for wrong in ({"kl": 0.0051}, {"far": 0.011}, {"kl": math.nan}):
        with pytest.raises(WeightSyncError, match="must sample from the trainer's weights, but in step 1 "):
            check(1, None, **wrong)


def test_older_samples_may_differ_by_the_drift_too():
    """A few tokens that became likely make k3 and the share of far tokens large; the mean difference they do not."""
    check(3, 0.2, kl=9.0, far=0.5, apart=ROUNDING + 0.59)
    check(3, 0.0, apart=ROUNDING - 1e-6)
    check(3, None, apart=9.0)
    for drift, apart in ((0.2, ROUNDING + 0.61), (0.0, ROUNDING + 1e-3), (0.2, math.nan)):
        with pytest.raises(WeightSyncError, match="in step 3 samples of version 0 differ by"):
            check(3, drift, apart=apart)
