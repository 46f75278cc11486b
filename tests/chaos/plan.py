"""Which process is killed where: every fault point x every role x seeds, packed into few runs.

Every kill of a run has a step of its own. Kills that must lose no step (engines, rewards) have runs to themselves, so
that a lost step cannot be blamed on another kill. Points of a resume need something that makes the run resume: a
trainer rank is killed two steps after the checkpoint, which counts as a kill too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo.run.faults import POINTS, struck_name
from tests.chaos.reward import SLOW

SOFT = ("rollout_actor", "engine_core", "reward_worker")
"""Roles whose loss must not cost a finished step."""
HARD = ("trainer_rank", "gcs", "controller")
ROLES = SOFT + HARD
PHASES = {
    "generate": ("generate.dispatched", "rollout.ended"),
    "reward": ("reward.began", "reward.ended"),
    "forward": ("train.dispatched", "train.forward"),
    "optimizer step": ("train.optimizer", "train.stepped"),
    "save": ("save.begin", "save.files", "save.written", "save.manifest"),
    "pointer": ("save.renamed", "save.pointer", "save.done"),
    "sync": ("sync.dispatched", "sync.tensor", "sync.received", "sync.done"),
    "resume": ("resume.found", "resume.loaded", "resume.restored"),
}
EVERY = 3  # checkpoint.every of run.yaml
STEPS = (1, 5, 9, 10, 14, 18)  # before the first checkpoint, and 0, 1 and 2 steps behind one


@dataclass(frozen=True)
class Kill:
    """One kill; `place` is that of the victim among the processes of its role, -1 for all of them."""

    point: str
    step: int
    role: str
    place: int = 0
    action: str = "kill"

    @property
    def spec(self) -> str:
        """What GRPO_FAULTS says: who passes a point kills itself, others are killed by whoever passes it."""
        at_rank = POINTS[self.point].startswith("trainer rank")
        itself = self.role == ("trainer_rank" if at_rank else "controller")
        rank = "" if not at_rank else "/0" if self.point == "sync.tensor" else f"/{max(self.place, 0) if itself else 0}"
        victim = "" if itself else f"={self.role}" + (f"/{self.place}" if self.place >= 0 else "")
        return f"{self.point}@{self.step}{rank}:{self.action}{victim}"

    @property
    def struck(self) -> str:
        return struck_name(self.spec)

    @property
    def phase(self) -> str:
        return next(phase for phase, points in PHASES.items() if self.point in points)


@dataclass(frozen=True)
class Scenario:
    """One run and what is done to it."""

    name: str
    seed: int
    kills: tuple[Kill, ...] = ()
    overrides: tuple[str, ...] = ()
    slow: str = ""
    """Seed of the time by which everything takes longer; "" for none."""

    @property
    def faults(self) -> str:
        return "; ".join(kill.spec for kill in self.kills)


def sweep(roles: Sequence[str], phases: Sequence[str], seeds: int) -> list[Scenario]:
    """All runs. Even seeds have one engine, which every step needs; odd ones two, of which one may be away for long."""
    points = [point for phase in phases for point in PHASES[phase]]
    resuming = [point for point in points if point.startswith("resume.")]
    ordinary = [point for point in points if point not in resuming]
    runs = []
    for seed in range(seeds):
        engines = (f"rollout.engines={1 + seed % 2}",)
        for number in range((len(ordinary) + 1) // 2):
            pair = ordinary[2 * number : 2 * number + 2]
            for kind, group in (("soft", SOFT), ("hard", HARD)):
                kills = tuple(_spread(pair, rotated([role for role in group if role in roles], number + seed), seed))
                name = f"{kind}-{number:02d}-seed{seed}"
                runs += [Scenario(name, seed, kills, engines)] if kills else []
        for number, point in enumerate(resuming):
            kills = tuple(_resumed(point, rotated([role for role in ROLES if role in roles], number + seed), seed))
            runs += [Scenario(f"{point}-seed{seed}", seed, kills, engines)]
    return runs


def slowed(count: int) -> list[Scenario]:
    """Runs that nothing is done to, but that every call takes a random time; the number of engines changes nothing."""
    seen = f"reward_code.environment=[{SLOW}]"
    return [
        Scenario(f"slowed-{number}", number % 2, (), (f"rollout.engines={1 + (number + 1) % 3}", seen), str(number + 1))
        for number in range(count)
    ]


def rotated(roles: Sequence[str], by: int) -> list[str]:
    """The roles in another order, so that each meets each distance to the last checkpoint."""
    by %= max(1, len(roles))
    return [*roles[by:], *roles[:by]]


def _spread(points: Sequence[str], roles: Sequence[str], seed: int) -> Iterator[Kill]:
    pairs = [(point, role) for point in points for role in roles]
    for number, (point, role) in enumerate(pairs):
        step = EVERY * (number + 1) if point.startswith("save.") else STEPS[number]
        yield Kill(point, step, role, _place(number, seed))


def _resumed(point: str, roles: Sequence[str], seed: int) -> Iterator[Kill]:
    for number, role in enumerate(roles):
        step = EVERY * number if point == "resume.restored" else EVERY * (number + 1)
        if step:  # every start resumes, the first at step 0
            yield Kill("train.forward", step + 2, "trainer_rank", (number + seed) % 2)
        yield Kill(point, step, role, _place(number, seed))


def _place(number: int, seed: int) -> int:
    """One victim or the other; with an odd seed now and then all at once."""
    return -1 if seed % 2 and number % 3 == 2 else (number + seed) % 2


def quick() -> list[Scenario]:
    """A few kills of every role, in two runs."""
    soft = ("generate.dispatched", "rollout_actor"), ("sync.tensor", "engine_core"), ("reward.began", SOFT[2])
    hard = ("train.stepped", "trainer_rank"), ("save.renamed", "controller"), ("rollout.ended", "gcs")
    again = ("resume.found", "controller"), ("sync.received", "rollout_actor"), ("save.files", "trainer_rank")
    return [_quick("quick-soft", soft, 1), _quick("quick-hard", hard, 0), _quick("quick-again", again, 1)]


def _quick(name: str, pairs: Sequence[tuple[str, str]], seed: int) -> Scenario:
    kills = []
    for number, (point, role) in enumerate(pairs):
        if point == "resume.found":
            kills.append(Kill("train.forward", EVERY * (number + 1) + 2, "trainer_rank"))
        step = EVERY * (number + 1) if point.startswith(("save.", "resume.")) else STEPS[number]
        kills.append(Kill(point, step, role, number % 2))
    return Scenario(name, seed, tuple(kills), (f"rollout.engines={1 + seed % 2}",))


def real() -> list[Scenario]:
    """24 kills of the real stack: each role four times, in all phases, from before the first checkpoint to the end."""
    soft = (
        Kill("generate.dispatched", 1, "engine_core"),
        Kill("reward.began", 2, "reward_worker"),
        Kill("sync.tensor", 3, "rollout_actor"),
        Kill("save.written", 3, "engine_core"),
        Kill("train.optimizer", 4, "reward_worker"),
        Kill("generate.dispatched", 5, "rollout_actor"),
        Kill("sync.dispatched", 6, "engine_core"),
        Kill("rollout.ended", 7, "reward_worker"),
        Kill("train.forward", 8, "rollout_actor"),
        Kill("sync.received", 9, "engine_core"),
        Kill("reward.began", 10, "reward_worker"),
        Kill("save.pointer", 12, "rollout_actor"),
    )
    hard = (
        Kill("train.optimizer", 1, "trainer_rank"),
        Kill("save.files", 3, "controller"),
        Kill("generate.dispatched", 4, "gcs"),
        Kill("sync.tensor", 5, "trainer_rank"),
        Kill("save.renamed", 6, "controller"),
        Kill("resume.restored", 6, "trainer_rank"),
        Kill("train.stepped", 7, "gcs"),
        Kill("reward.ended", 8, "controller"),
        Kill("save.files", 9, "trainer_rank"),
        Kill("sync.received", 10, "gcs"),
        Kill("save.written", 12, "gcs"),
        Kill("sync.dispatched", 13, "controller"),
    )
    return [Scenario("real-soft", 0, soft), Scenario("real-hard", 0, hard)]
