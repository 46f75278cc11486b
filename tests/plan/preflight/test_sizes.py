"""What there is against the plan."""

from pathlib import Path

import pytest

from grpo.plan.memory import GIB, make_plan
from grpo.plan.preflight import sizes
from grpo.plan.preflight.verdict import Check
from tests.plan.preflight.sites import config, facts, node, site, two


def test_shared_memory_for_the_queues_is_a_must_and_for_objects_advice() -> None:
    def checked(shm: int, split: int) -> Check:
        wanted = config(rollout={"tensor_parallel": split}, cluster={"device": "cuda"})
        found = {node("r", "rollout", gpus=4, object_store=GIB): facts(shm=shm), node("t", "trainer", gpus=1): facts()}
        return sizes.shared_memory(site(wanted, found, "cuda"), make_plan(wanted))

    assert checked(8 * GIB, 4).status == "ok"
    assert checked(GIB, 1).status == "warning"
    tight = checked(64 << 20, 4)
    assert tight.status == "failed" and "r: /dev/shm has 64.0 MiB, engines and ranks there need 1.67 GiB" in tight.text


@pytest.mark.parametrize(("memory", "status"), [(8 * GIB, "ok"), (3 * GIB, "warning"), (1 * GIB, "failed")])
def test_a_limit_below_what_is_certain_fails_below_the_estimate_warns(memory: int, status: str) -> None:
    wanted = config(rollout={"kv_cache_gib": 2.0}, cluster={"device": "cpu"})
    found = {node("r", "rollout"): facts(memory=memory), node("t", "trainer"): facts()}
    assert sizes.memory(site(wanted, found), make_plan(wanted)).status == status


def test_the_smallest_gpu_counts() -> None:
    assert sizes.gpus(two("cuda")).status == "ok"
    small = sizes.gpus(two("cuda", "trainer", gpus=(GIB // 32,)))
    assert small.status == "failed" and "of a GPU's 0 GiB" in small.text
    assert sizes.gpus(two("cuda", "trainer", gpus=())).status == "warning"


def test_space_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(config())
    monkeypatch.setattr("psutil.disk_usage", lambda _: type("Usage", (), {"free": made.volume - 1000})())
    short = sizes.space(two(), made, str(tmp_path / "not" / "yet"))
    assert (short.status, "4 checkpoints of 22.2 MiB" in short.text) == ("failed", True)
    (tmp_path / "step_000001").write_bytes(bytes(1000))
    assert sizes.space(two(), made, str(tmp_path)).status == "ok"
    assert sizes.space(two(), made, "s3://bucket/x").status == "ok"
    full = two("cpu", "trainer", temporary=made.checkpoint - 1)
    assert sizes.space(full, made, "s3://bucket/x").text.startswith("trainer: 22.2 MiB free for temporary files")
