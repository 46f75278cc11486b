"""All that is known of the machines, as the checks that only compare get it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from grpo.config import Config
from grpo.plan.placement import ROLES, Node, Role
from grpo.plan.preflight.facts import Facts


@dataclass(frozen=True)
class Site:
    """`nodes` are those that may host actors; `facts` by node id, of those that have answered; `driver` is here."""

    config: Config
    device: str
    nodes: Sequence[Node]
    facts: Mapping[str, Facts]
    driver: Facts

    def known(self) -> Iterator[tuple[Node, Facts]]:
        """The nodes that have answered, with their facts."""
        for node in self.nodes:
            if node.id in self.facts:
                yield node, self.facts[node.id]

    def of(self, role: Role) -> Iterator[tuple[Node, Facts]]:
        """The nodes on which Ray may put an actor of the role."""
        return ((node, facts) for node, facts in self.known() if node.may_host(role))

    def roles(self, node: Node) -> list[Role]:
        """The roles whose actors Ray may put on the node."""
        return [role for role in ROLES if node.may_host(role)]
