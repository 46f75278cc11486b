"""The trainer rank's actor: one sender at a time."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.cluster.actors import PolicyModelActor
from grpo.errors import DeadlineExceeded
from grpo.types import TensorRecord
from tests.cluster.actors import make_config

SECONDS = 30.0


class Sending:
    """A transport and a trainer; what is sent waits for `gate`."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.sent: list[int] = []
        self.published = self

    def send(self, version: int, tensors: Iterable[object]) -> tuple[TensorRecord, ...]:
        self.begun.set()
        assert self.gate.wait(SECONDS)
        self.sent.append(version)
        return tuple(TensorRecord(str(name), (), "float32", "d") for name in tensors)

    @contextmanager
    def sending(self, version: int) -> Iterator[list[str]]:
        yield [f"copy {version}"]

    def iter_weights(self) -> list[str]:
        return ["live"]


def make_actor(run_dir: Path, sync: float) -> tuple[PolicyModelActor, Sending]:
    actor: Any = PolicyModelActor(make_config(run_dir, deadlines={"sync": sync}), 0, "cpu")
    actor.trainer = actor.transport = parts = Sending()
    return actor, parts


@pytest.mark.parametrize("second", ["send_weights", "send_published"])
def test_a_second_sender_waits_for_the_first(tmp_path: Path, second: str) -> None:
    actor, parts = make_actor(tmp_path, SECONDS)
    first = threading.Thread(target=actor.send_published, args=(1,))
    first.start()
    assert parts.begun.wait(SECONDS)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(getattr(actor, second)(2)))
    other.start()
    assert parts.sent == []
    parts.gate.set()
    first.join(SECONDS)
    other.join(SECONDS)
    assert parts.sent == [1, 2]
    assert [record.name for record in found[0].records] == ["live" if second == "send_weights" else "copy 2"]


def test_a_second_sender_does_not_wait_for_ever(tmp_path: Path) -> None:
    actor, parts = make_actor(tmp_path, 0.1)
    first = threading.Thread(target=actor.send_published, args=(1,))
    first.start()
    assert parts.begun.wait(SECONDS)
    with pytest.raises(DeadlineExceeded, match="one version at a time, but one takes longer than 0.1 s"):
        actor.send_weights(2)
    parts.gate.set()
    first.join(SECONDS)
    assert parts.sent == [1]


@pytest.mark.parametrize(
    ("device", "train", "threads"),
    [
        ("cpu", {}, 4),
        ("cuda", {}, None),  # as Ray says: the CPU only drives the GPU
        ("cuda", {"offload_optimizer": "cpu", "zero_stage": 2}, 4),
        ("cuda", {"offload_optimizer": "cpu", "offload_param": "cpu", "zero_stage": 3, "lora": {}}, 4),
    ],
)
def test_a_rank_has_its_share_of_the_cores_where_the_cpu_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, train: dict[str, Any], threads: int | None
) -> None:
    given: dict[str, Any] = {}

    def made(config: Any, **keys: Any) -> Any:
        given.update(keys)
        return SimpleNamespace(notes=())

    monkeypatch.setattr("grpo.trainer.PolicyTrainer", made)
    monkeypatch.setattr("grpo.cluster.actors.node_id", lambda: "mine")
    monkeypatch.setattr("grpo.cluster.actors.usable_cores", lambda: 8)
    monkeypatch.setattr("grpo.cluster.nodes.on_my_node", lambda config, actors: actors)
    PolicyModelActor(make_config(tmp_path, train={"ranks": 2, **train}), 0, device).start("host", 1)
    assert given["threads"] == threads and given["world_size"] == 2
