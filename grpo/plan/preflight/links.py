"""Verdicts on the network and on clocks, which only a comparison of machines can give."""

import ipaddress
from collections.abc import Mapping, Sequence

from grpo.plan.preflight.network import chosen, interface_of
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, judge

SKEW_SECONDS = 2.0


def interfaces(site: Site) -> Check:
    """The interface by which each node is known to the others, and those that NCCL_ and GLOO_SOCKET_IFNAME name."""
    problems, used = [], set()
    several = len({node.address for node in site.nodes}) > 1
    for node, facts in site.known():
        name = interface_of(node.address, facts.interfaces)
        used.add(name or node.address)
        if not name:
            text = f"no interface has the address {node.address} by which Ray knows it"
            problems.append(Problem("warning", node.name, text))
        for variable, value in facts.named.items():
            hit = chosen(variable, value, list(facts.interfaces))
            if not hit:
                text = f"{variable}={value} names none of {', '.join(facts.interfaces)}"
                problems.append(Problem("failed", node.name, text))
            elif several and all(loopback(facts.interfaces[name]) for name in hit):
                problems.append(Problem("failed", node.name, f"{variable}={value} is the loopback of each node"))
        if several and "GLOO_SOCKET_IFNAME" not in facts.named and loopback([facts.hostname]):
            text = f"its own name stands for {facts.hostname or 'nothing'}, where gloo would listen"
            problems.append(Problem("warning", node.name, text))
    return judge("interfaces", problems, ", ".join(sorted(used)), "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")


def loopback(addresses: Sequence[str]) -> bool:
    """Whether nobody else can reach any of these; also if there is none."""
    return all(not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def connections(errors: Mapping[tuple[str, str], str], pairs: int) -> Check:
    """Trial connections; `errors` by names of the nodes, from and to; `pairs`: how many were tried."""
    problems = [Problem("failed", here, f"no connection to {there}: {text}") for (here, there), text in errors.items()]
    way_out = "all ports must be open among the run's pods: look at NetworkPolicies and security groups"
    well = f"{pairs} connections by TCP came about" if pairs else "one machine"
    return judge("connections", problems, well, way_out)


def clocks(skews: Mapping[str, float]) -> Check:
    """`skews`: seconds by node that its clock differs from the driver's, at least."""
    far = {name: skew for name, skew in skews.items() if abs(skew) > SKEW_SECONDS}
    problems = [Problem("warning", name, f"its clock is {skew:+.1f} s off the driver's") for name, skew in far.items()]
    most = max((abs(skew) for skew in skews.values()), default=0.0)
    return judge("clocks", problems, f"at most {most:.1f} s apart", "run a time service on the nodes")
