"""What drives workers: how often lost ones may be replaced."""

import pytest

from grpo.cluster.context import RecoveryBudget
from grpo.errors import ClusterError, EngineLost


def test_too_many_recoveries_without_a_checkpoint_end_the_run() -> None:
    recoveries = RecoveryBudget(2)
    for _ in range(3):
        recoveries.spend(EngineLost("engine 0 died"))
        recoveries.reset()
    recoveries.spend(EngineLost("engine 0 died"))
    recoveries.spend(EngineLost("engine 0 died"))
    recoveries.spend(EngineLost("its node drains", counts=False))
    with pytest.raises(ClusterError, match="^engine 1 died; .* replaced 2 times since the last checkpoint") as caught:
        recoveries.spend(EngineLost("engine 1 died"))
    assert not isinstance(caught.value, EngineLost)
