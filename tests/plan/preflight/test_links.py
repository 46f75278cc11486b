"""Between nodes."""

import dataclasses
from typing import Any

import pytest

from grpo.plan.preflight import links
from tests.plan.preflight.sites import config, facts, node, site


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({}, "ok", "eth0"),
        ({"named": {"NCCL_SOCKET_IFNAME": "ib"}}, "failed", "NCCL_SOCKET_IFNAME=ib names none of lo, eth0"),
        ({"named": {"GLOO_SOCKET_IFNAME": "lo"}}, "failed", "is the loopback"),
        ({"hostname": "127.0.1.1"}, "warning", "its own name stands for 127.0.1.1"),
        ({"interfaces": {"lo": ("127.0.0.1",)}}, "warning", "no interface has the address 10.0.0.1"),
    ],
)
def test_a_wrong_interface_is_named(changes: dict[str, Any], status: str, told: str) -> None:
    found = {node("a"): facts(**changes), dataclasses.replace(node("rollout"), address="10.0.0.7"): facts()}
    check = links.interfaces(site(config(), found))
    assert (check.status, told in check.text) == (status, True)


def test_a_clock_that_is_off_is_a_warning() -> None:
    assert links.clocks({"a": 0.5}).status == "ok"
    assert links.clocks({"a": 0.5, "b": -9.0}).text.startswith("b: its clock is -9.0 s off")
