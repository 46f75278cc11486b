"""The self-test's rule."""

import math
from typing import Any

import pytest

from grpo.errors import WeightSyncError
from grpo.types import Manifest, TensorRecord
from grpo.weights import check_adapter_sent, check_self_test


def test_self_test_returns_the_worst_difference_of_the_true_weights() -> None:
    perturbed = ([-5.0, -6.0], [[-5.02, -6.0], [-5.0, -6.08]])
    true = ([-1.0, -2.0], [[-1.0, -2.0], [-1.0, -2.02]])
    assert check_self_test(perturbed, true, tolerance=0.1) == pytest.approx(0.01)


def test_self_test_allows_for_what_a_perturbation_amplifies_and_no_more() -> None:
    """Moved by 4 nats: 0.1 + 0.2 x 4 = 0.9 may be missed."""
    true = ([-1.0], [[-1.0]])
    assert check_self_test(([-5.0], [[-4.11]]), true, tolerance=0.1) == 0.0
    with pytest.raises(WeightSyncError, match=r"within 0.9 nats \(sync.tolerance = 0.1\).* differ by 0.91"):
        check_self_test(([-5.0], [[-4.09]]), true, tolerance=0.1)


@pytest.mark.parametrize(
    ("perturbed", "true", "message"),
    [
        (
            ([-5.0], [[-5.0], [-1.0]]),
            ([-1.0], [[-1.0], [-1.0]]),
            "engine 1 .* with the perturbed weights .* differ by 4",
        ),
        (([-5.0], [[-5.0]]), ([-1.0], [[-5.0]]), "engine 0 .* with the true weights"),
        (([-1.1], [[-1.1]]), ([-1.0], [[-1.0]]), "must move the trainer's logprobs by at least 0.3 nats"),
        (([-5.0], [[math.nan]]), ([-1.0], [[-1.0]]), "engine 0 .* differ by nan"),
        (([math.nan], [[-5.0]]), ([-1.0], [[-1.0]]), "moved them by nan"),
        (([-5.0], [[-5.0, -6.0]]), ([-1.0], [[-1.0]]), "equally many logprobs, but got 1 and 2"),
        (([-5.0], []), ([-1.0], []), "at least one engine"),
    ],
)
def test_self_test_refuses(perturbed: Any, true: Any, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        check_self_test(perturbed, true, tolerance=0.1)


def test_a_few_tokens_that_are_wrong_are_not_averaged_away() -> None:
    """One token in twenty may be an accident of rounding; three are not, whatever the mean says."""
    true, moved = [-1.0] * 40, [-5.0] * 40
    for wrong, refused in ((2, False), (3, True)):
        engine = true[:-wrong] + [-1.9] * wrong
        assert sum(map(lambda a, b: abs(a - b), engine, true)) / 40 < 0.1
        if refused:
            with pytest.raises(WeightSyncError, match=r"true weights .* on average and 0.9 in one of 20"):
                check_self_test((moved, [moved]), (true, [engine]), tolerance=0.1)
        else:
            check_self_test((moved, [moved]), (true, [engine]), tolerance=0.1)


def sent(**digests: str) -> Manifest:
    return Manifest(0, tuple(TensorRecord(name, (2,), "float32", digest) for name, digest in digests.items()))


ANNOUNCED = tuple(TensorRecord(name, (2,), "float32", moves=name != "norm") for name in ("q", "k", "norm"))


def test_each_matrix_under_an_adapter_must_be_sent_otherwise_once_that_is_perturbed() -> None:
    true = sent(q="1", k="2", norm="3")
    check_adapter_sent(sent(q="4", k="5", norm="6"), true, ANNOUNCED)
    check_adapter_sent(sent(q="4", k="5", norm="3"), true, ANNOUNCED)
    with pytest.raises(WeightSyncError, match="each matrix that it changes, but k was sent with the same bits"):
        check_adapter_sent(sent(q="4", k="2", norm="6"), true, ANNOUNCED)
    with pytest.raises(WeightSyncError, match="but q and 1 more was sent"):
        check_adapter_sent(sent(q="1", k="2", norm="6"), true, ANNOUNCED)


def test_without_an_adapter_a_tensor_may_stay_as_it_is() -> None:
    """A buffer, which is no parameter, is not perturbed."""
    announced = [TensorRecord(name, (2,), "float32") for name in ("q", "k", "norm")]
    check_adapter_sent(sent(q="4", k="2", norm="3"), sent(q="1", k="2", norm="3"), announced)
