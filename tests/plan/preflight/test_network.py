"""Interfaces."""

import pytest

from grpo.plan.preflight.network import chosen


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth1,lo", ["lo", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "^lo,eth0", ["eth1"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
    ],
)
def test_interfaces_are_chosen_as_the_libraries_do(variable: str, value: str, names: list[str]) -> None:
    assert chosen(variable, value, ["lo", "eth0", "eth1"]) == names
