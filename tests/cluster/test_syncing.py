"""Which engines take part in a weight sync; that a real one works is shown by the tests of whole runs."""

from types import SimpleNamespace
from typing import Any

from grpo.cluster.syncing import RayWeights
from tests.runs import make_config


class LeavingFleet:
    """Its only engine has to leave its node just as a sync begins; the new one is there once somebody waits for it."""

    def __init__(self) -> None:
        self.slots = [SimpleNamespace(handle="old")]
        self.waited: list[bool] = []
        self.observer = SimpleNamespace(policy_version=lambda role, version: None)

    def gather(self, wait: bool) -> None:
        self.waited.append(wait)
        self.slots = [SimpleNamespace(handle="new")] if wait else []

    def of(self, *_states: object) -> list[SimpleNamespace]:
        return self.slots

    def verified(self) -> None:
        pass


def test_a_sync_waits_for_a_new_engine_where_the_last_one_just_leaves() -> None:
    fleet: Any = LeavingFleet()
    trainer: Any = SimpleNamespace(ready=lambda: None, connected=True)
    weights = RayWeights(SimpleNamespace(), make_config(), fleet, trainer, self_test_prompt=[1])  # type: ignore[arg-type]
    sent: list[list[str]] = []

    def send(version: int) -> Any:
        sent.append([slot.handle for slot in fleet.slots])
        return SimpleNamespace(records=())

    weights._connect = dict  # type: ignore[method-assign, assignment]
    weights._send = send  # type: ignore[method-assign]
    weights._call = lambda verb, *args: None  # type: ignore[method-assign]
    weights.sync(version=3)
    assert (sent, fleet.waited, weights.version) == ([["new"]], [False, True], 3)
