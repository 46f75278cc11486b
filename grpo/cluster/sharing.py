"""GPUs that several actors share: Ray is told which, as it would put two ranks on one where both find room."""

from collections.abc import Callable, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.plan.placement import CPUS, OTHER_ROLE, Group, Role


class SharedGpus:
    """A placement group of Ray for each shared GPU, made when its first actor comes."""

    def __init__(self, groups: Sequence[Group], selector: Callable[[Role, int], dict[str, str]]) -> None:
        """`selector` says which nodes an actor may be on."""
        shared = [group for group in groups if group.gpus == 1]
        self.groups = {member: group for group in shared for member in group.members}
        self.selector = selector
        self._made: dict[Group, PlacementGroup] = {}

    def strategy(self, role: Role, index: int, draining: frozenset[str]) -> PlacementGroupSchedulingStrategy | None:
        """Where an actor goes that reserves a share of a GPU; another GPU where its node is about to go away."""
        group = self.groups.get((role, index))
        if group is None:
            return None
        if group not in self._made or node_of(self._made[group]) in draining:
            self._made[group] = self._make(group)
        return PlacementGroupSchedulingStrategy(self._made[group], placement_group_bundle_index=0)

    def lane(self, role: Role, index: int) -> int:
        """The place of an actor among those of its role that share its GPU, from 0 on."""
        group = self.groups.get((role, index))
        return group.seat(role, index) if group else 0

    def _make(self, group: Group) -> PlacementGroup:
        """A whole GPU, so that no other group gets a part of it."""
        bundle = {"CPU": CPUS * len(group.members), "GPU": group.gpus}
        made: PlacementGroup = placement_group([bundle], bundle_label_selector=[self._selector(group)])
        return made

    def _selector(self, group: Group) -> dict[str, str]:
        """That of the members; nodes without a role where it is of both."""
        selectors = [self.selector(*member) for member in group.members]
        if len({member[0] for member in group.members}) == 1:
            return selectors[0]
        barred = ",".join(sorted(OTHER_ROLE[role] for role in {role for role, _ in group.members}))
        return dict.fromkeys(selectors[0], f"!in({barred})")


def node_of(made: PlacementGroup) -> str | None:
    """The node that Ray has chosen; None as long as it has not."""
    table: dict[str, Any] = placement_group_table(made)
    node: str | None = table.get("bundles_to_node_id", {}).get(0)
    return node
