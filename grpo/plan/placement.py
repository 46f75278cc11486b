"""Which actor may run on which node: what `cluster` asks of Ray, worked out beforehand to say what is missing."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grpo.config import Config

Role = Literal["rollout", "trainer"]
ROLES: tuple[Role, Role] = ("rollout", "trainer")
OTHER_ROLE = {"rollout": "trainer", "trainer": "rollout"}
ACTORS = {"rollout": "engine", "trainer": "trainer rank"}
CPUS = 1
"""Ray CPUs that each actor reserves."""
SMALL = 1e-4
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True)
class Node:
    """A node as Ray knows it. `role` is the value of its label `cluster.role_label`, None without one."""

    id: str
    name: str
    address: str
    role: str | None
    cpus: float
    gpus: float
    object_store: int = 0

    @property
    def hosts(self) -> bool:
        """Whether any actor fits: a node without CPUs (a head) hosts nothing."""
        return self.cpus >= CPUS

    def may_host(self, role: Role) -> bool:
        """The rule of the actors' label selector."""
        return self.hosts and self.role != OTHER_ROLE[role]

    def __str__(self) -> str:
        return f"{self.name} ({self.cpus:g} CPUs, {self.gpus:g} GPUs, {self.role or 'no role'})"


@dataclass(frozen=True)
class Group:
    """Actors, by role and index, that have `gpus` whole GPUs of one node to themselves; several share the only one."""

    members: tuple[tuple[Role, int], ...]
    gpus: int

    def count(self, role: Role) -> int:
        """How many actors of the role are in it."""
        return sum(member == role for member, _ in self.members)

    def seat(self, role: Role, index: int) -> int:
        """The place of an actor among those of its role, from 0 on."""
        return [member for member in self.members if member[0] == role].index((role, index))

    def may_be_on(self, node: Node) -> bool:
        """Whether all of them may be there."""
        return all(node.may_host(role) for role, _ in self.members)


@dataclass
class Room:
    """What is left of a node while it is filled."""

    node: Node
    cpus: float
    gpus: int

    def take(self, group: Group) -> bool:
        """Whether one more group fits; takes its share."""
        if self.cpus < CPUS * len(group.members) or self.gpus < group.gpus:
            return False
        self.cpus -= CPUS * len(group.members)
        self.gpus -= group.gpus
        return True


@dataclass
class Placement:
    """`hosted` counts the actors of a role by node id; `missing` those without a place."""

    groups: list[Group]
    hosted: dict[Role, Counter[str]] = field(default_factory=lambda: {role: Counter() for role in ROLES})
    missing: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))


def actors(config: Config, role: Role) -> int:
    """How many actors of the role the run needs; more engines may come where `rollout.engines` is a range."""
    return config.rollout.fewest_engines if role == "rollout" else config.train.ranks


def with_engines(config: Config, engines: int) -> Config:
    """The run with so many engines, whatever comes or goes."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engines": engines})})


def gpus_of(config: Config, role: Role) -> float:
    """Ray GPUs of an actor on CUDA."""
    several = config.rollout.engines_per_gpu
    if config.cluster.colocate:
        return SMALL * (1 / SMALL // (several + 1))
    if role == "rollout":
        each = config.rollout.gpus_per_engine
        return each or (SMALL * (1 / SMALL // several) if several > 1 else config.rollout.tensor_parallel)
    return config.train.gpus_per_rank or 1


def needs(config: Config, device: str) -> Mapping[Role, float]:
    """Ray GPUs that an actor of each role reserves on `device`."""
    return {role: gpus_of(config, role) if device == "cuda" else 0.0 for role in ROLES}


def grouped(config: Config, device: str, mixed: bool = True, roles: Sequence[Role] = ROLES) -> list[Group]:
    """All actors of these roles, those together that share a GPU; `mixed`: also those of different roles.

    NCCL refuses two ranks on one GPU, so a rank shares its GPU with engines alone. Engines spread over as few GPUs as
    their shares need: first over those of ranks.
    """
    wanted = needs(config, device)
    alone = [role for role in roles if not 0 < wanted[role] < 1]
    groups = [Group(((role, index),), int(wanted[role])) for role in alone for index in range(actors(config, role))]
    ranks = actors(config, "trainer") * ("trainer" in roles and "trainer" not in alone)
    beside = _fits(1 - wanted["trainer"], wanted["rollout"]) if mixed else 0
    left = actors(config, "rollout") * ("rollout" in roles and "rollout" not in alone)
    with_ranks = min(left, beside * ranks)
    shared: list[list[tuple[Role, int]]] = [[("trainer", index)] for index in range(ranks)]
    for index in range(with_ranks):
        shared[index % ranks].append(("rollout", index))
    if left := left - with_ranks:
        # Without ranks, as in an evaluation, they leave the room of theirs free.
        most = config.rollout.engines_per_gpu if config.cluster.colocate else _fits(1, wanted["rollout"])
        count = -(-left // most)
        own: list[list[tuple[Role, int]]] = [[] for _ in range(count)]
        for index in range(left):
            own[index * count // left].append(("rollout", with_ranks + index))
        shared += own
    return groups + [Group(tuple(members), 1) for members in shared]


def _fits(room: float, share: float) -> int:
    return int((room + SMALL) / share) if share else 0


def place(config: Config, device: str, nodes: Sequence[Node], roles: Sequence[Role] = ROLES) -> Placement:
    """Fills the nodes. Roles share a GPU where nodes of both have room for that, else each has GPUs of its own.

    With `cluster.colocate` they must.
    """
    together = _place(grouped(config, device, True, roles), nodes)
    if config.cluster.colocate:
        return together
    apart = _place(grouped(config, device, False, roles), nodes)
    both = any(node.gpus and all(node.may_host(role) for role in ROLES) for node in nodes)
    lacking = any(together.missing.values())
    return together if not lacking or (both and any(apart.missing.values())) else apart


def _place(groups: list[Group], nodes: Sequence[Node]) -> Placement:
    """Nodes of one role before those of both; what has many GPUs, or many actors on one, first."""
    rooms = [Room(node, node.cpus, int(node.gpus)) for node in nodes]
    done = Placement(groups)
    for group in sorted(groups, key=lambda group: (-group.gpus, -len(group.members), group.members[0][0])):
        own = [room for room in rooms if group.may_be_on(room.node)]
        own.sort(key=lambda room: room.node.role is None)
        room = next((room for room in own if room.take(group)), None)
        for role, _ in group.members:
            if room:
                done.hosted[role][room.node.id] += 1
            else:
                done.missing[role] += 1
    return done


def room_for_engines(config: Config, device: str, nodes: Sequence[Node], roles: Sequence[Role] = ROLES) -> int:
    """How many engines find a place on these nodes beside all ranks: from the fewest to the most of the run."""
    rollout, each = config.rollout, needs(config, device)["rollout"]
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    beyond = rollout.most_engines - int(min(cpus / CPUS, gpus / each + SMALL if each else math.inf))
    most = rollout.most_engines - rollout.engines_per_gpu * max(0, -(-beyond // rollout.engines_per_gpu))
    for engines in range(most, rollout.fewest_engines, -rollout.engines_per_gpu):
        if not any(place(with_engines(config, engines), device, nodes, roles).missing.values()):
            return engines
    return rollout.fewest_engines


def cpus_alone(config: Config, cores: int) -> int:
    """Ray CPUs of a machine on its own: one for each actor that the run needs, and for further engines up to its cores.

    No node comes there: all engines that it has room for start at once.
    """
    engines = max(config.rollout.fewest_engines, min(config.rollout.most_engines, cores))
    return max(engines + config.train.ranks, cores)


def crowded(config: Config, device: str) -> str:
    """Why engines cannot share a GPU as they would, or ""."""
    most = max((group.count("rollout") for group in grouped(config, "cuda")), default=0)
    share = config.rollout.engine_memory
    if device == "cpu" or most * share < 1 or most == 1:
        return ""
    return (
        f"{most} engines share a GPU (rollout.gpus_per_engine = {gpus_of(config, 'rollout'):g}) and each takes "
        f"rollout.memory_utilization = {share:g} of its memory: lower that below {1 / most:.2g}, or write "
        "rollout.engines_per_gpu instead of gpus_per_engine"
    )


def refusal(config: Config, device: str, nodes: Sequence[Node], roles: Sequence[Role] = ROLES) -> str:
    """Why the run cannot be on these nodes, whatever comes, or ""."""
    missing = place(config, device, nodes, roles).missing
    if not any(missing.values()):
        return crowded(config, device)
    wanted, gpus = needs(config, device), sum(int(node.gpus) for node in nodes)
    layout = " and ".join(f"{actors(config, role)} x {ACTORS[role]} with {wanted[role]:g} GPU each" for role in roles)
    lacking = " and ".join(f"{count} x {ACTORS[role]}" for role, count in missing.items() if count)
    lower = "train.ranks, rollout.engines, train.gpus_per_rank or rollout.gpus_per_engine"
    if config.rollout.engines_per_gpu > 1:
        lower = "train.ranks, rollout.engines or train.gpus_per_rank, or raise rollout.engines_per_gpu"
    return (
        f"{layout} must find their places on {gpus} GPUs, but {lacking} has none (a share is of one GPU, and two ranks "
        f"never share one): lower {lower}"
    )


def fits_alone(config: Config, device: str, role: Role, node: Node) -> bool:
    """Whether an actor would fit a node that holds nothing else."""
    gpus = -(-needs(config, device)[role] // 1)
    return node.may_host(role) and Room(node, node.cpus, int(node.gpus)).take(Group(((role, 0),), int(gpus)))
