"""Which actor may run on which node: what `cluster` asks of Ray, worked out beforehand to say what is missing."""

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


@dataclass
class Room:
    """What is left of a node while it is filled; `gpus` is what is left of each."""

    node: Node
    cpus: float
    gpus: list[float]

    def take(self, gpus: float) -> bool:
        """Whether one more actor fits; takes its share. A part of a GPU goes to the fullest that has it."""
        whole = [place for place, left in enumerate(self.gpus) if left > 1 - SMALL]
        if self.cpus < CPUS or (gpus >= 1 and len(whole) < gpus):
            return False
        if 0 < gpus < 1:
            able = [place for place, left in enumerate(self.gpus) if left > gpus - SMALL]
            if not able:
                return False
            self.gpus[min(able, key=lambda place: self.gpus[place])] -= gpus
        for place in whole[: int(gpus)]:
            self.gpus[place] = 0.0
        self.cpus -= CPUS
        return True


@dataclass
class Placement:
    """`hosted` counts the actors of a role by node id; `missing` those without a place."""

    hosted: dict[Role, Counter[str]] = field(default_factory=dict)
    missing: dict[Role, int] = field(default_factory=dict)


def actors(config: Config, role: Role) -> int:
    """How many actors of the role the run has."""
    return config.rollout.engines if role == "rollout" else config.train.ranks


def gpus_of(config: Config, role: Role) -> float:
    """Ray GPUs of an actor on CUDA."""
    if role == "rollout":
        return config.rollout.gpus_per_engine or config.rollout.tensor_parallel
    return config.train.gpus_per_rank or 1


def needs(config: Config, device: str) -> Mapping[Role, float]:
    """Ray GPUs that an actor of each role reserves on `device`."""
    return {role: gpus_of(config, role) if device == "cuda" else 0.0 for role in ROLES}


def place(config: Config, device: str, nodes: Sequence[Node]) -> Placement:
    """Fills the nodes: those of one role before those of both, and actors with many GPUs first."""
    rooms = [Room(node, node.cpus, [1.0] * int(node.gpus)) for node in nodes]
    done = Placement()
    wanted = needs(config, device)
    for role in sorted(ROLES, key=lambda role: -wanted[role]):
        own = [room for room in rooms if room.node.may_host(role)]
        own.sort(key=lambda room: room.node.role != role)
        done.hosted[role] = Counter()
        for _ in range(actors(config, role)):
            room = next((room for room in own if room.take(wanted[role])), None)
            if room:
                done.hosted[role][room.node.id] += 1
        done.missing[role] = actors(config, role) - done.hosted[role].total()
    return done


def fits_alone(config: Config, device: str, role: Role, node: Node) -> bool:
    """Whether an actor would fit a node that holds nothing else."""
    return node.may_host(role) and Room(node, node.cpus, [1.0] * int(node.gpus)).take(needs(config, device)[role])
