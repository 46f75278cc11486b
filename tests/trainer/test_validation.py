import math
from dataclasses import replace

import pytest

from grpo.errors import NonFiniteError, WeightSyncError
from grpo.trainer.limits import Limits
from grpo.trainer.validation import check_mismatch, check_samples
from grpo.types import Sample
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


def sampled(*logprobs: float, **more: object) -> Sample:
    made = random_samples(1)[0]
    return replace(made, prompt_id="p7", index=2, output_ids=(1,) * len(logprobs), logprobs=logprobs, **more)


def test_an_unknown_logprob_is_counted_and_taken():
    """One of however few, then one in a hundred; what is not trained is not looked at."""
    assert check_samples([sampled(-1.0, -2.0)]) == 0
    assert check_samples([sampled(-1.0, math.nan)]) == 1
    assert check_samples([sampled(*[-1.0] * 297, *[math.nan] * 3)]) == 3
    assert check_samples([sampled(*[-1.0] * 200), sampled(math.nan, -1.0, *[-1.0] * 98), sampled(math.nan)]) == 2
    assert check_samples([sampled(math.nan, math.inf, -1.0, trained=(False, False, True))]) == 0
    assert check_samples([sampled(math.nan, math.inf, masked=True)]) == 0
    assert check_samples([]) == 0


def test_many_unknown_logprobs_are_refused():
    rows = [sampled(*[-1.0] * 296), sampled(-1.0, *[math.nan] * 4)]
    text = "at most 1% of a sampler's logprobs may be unknown, but 4 of 301 are: token 1 of sample 2 of prompt p7 has n"
    with pytest.raises(NonFiniteError, match=text):
        check_samples(rows)
    with pytest.raises(NonFiniteError, match="but 2 of 2 are"):
        check_samples([sampled(math.nan, math.nan)])


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_one_infinite_logprob_is_refused(infinite):
    rows = [sampled(*[-1.0] * 1000), sampled(math.nan, infinite)]
    with pytest.raises(NonFiniteError, match="be finite, but token 1 of sample 2 of prompt p7 has -?inf; use"):
        check_samples(rows)
