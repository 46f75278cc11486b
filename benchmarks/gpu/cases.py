"""What can be measured: `s1`, `s2+e1+plain`, `s1+train.zero_stage=2`, `trl`, `trl-async`."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.work import TAIL

MODES: dict[str, tuple[str, ...]] = {
    "s0": (),
    "s1": ("rollout.max_staleness=1",),
    "s2": ("rollout.max_staleness=2", "rollout.update=in_flight"),
}
"""No overlap; one batch ahead, `between_batches`; two, `in_flight`."""
TURNS = "cluster.colocate=true"
"""Every GPU samples and trains, one after the other."""
LEVERS: dict[str, tuple[str, ...]] = {
    "e1": ("rollout.engines_per_gpu=1",),
    "e2": ("rollout.engines_per_gpu=2",),
    "e3": ("rollout.engines_per_gpu=3",),
    "e4": ("rollout.engines_per_gpu=4",),
    "plain": ("train.compile=false",),
    "8k": ("train.tokens_per_micro_batch=8192",),
    "16k": ("train.tokens_per_micro_batch=16384",),
    "recompute": ("train.gradient_checkpointing=true",),
    "eager": ("rollout.enforce_eager=true",),
    "turns": (TURNS, "rollout.memory_utilization=0.6"),
}
"""Changes of one mode, by short names; any other `key=value` of the configuration is one too."""
PEERS = {"trl": "TRL GRPOTrainer, server", "trl-async": "TRL async_grpo", "trl-turns": "TRL GRPOTrainer, colocate"}
AHEAD = "rollout.max_staleness="


@dataclass(frozen=True)
class Case:
    """One system with its settings."""

    name: str
    settings: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.partition("+")[0] not in PEERS

    @property
    def ahead(self) -> int:
        """Batches that are sampled ahead of training."""
        found = [setting.removeprefix(AHEAD) for setting in self.settings if setting.startswith(AHEAD)]
        return int(found[-1]) if found else 0

    @property
    def turns(self) -> bool:
        """Whether every GPU samples and trains; else half of them do the one, half the other."""
        return TURNS in self.settings or self.name.partition("+")[0] == "trl-turns"

    def setting(self, key: str, default: int) -> int:
        """The last value that the case gives to a key."""
        found = [setting.partition("=")[2] for setting in self.settings if setting.partition("=")[0] == key]
        return int(found[-1]) if found else default


def case_named(name: str) -> Case:
    """Raises ValueError for a name that means nothing."""
    mode, *levers = name.split("+")
    if mode in PEERS and all("=" in lever for lever in levers):
        return Case(name, tuple(levers))
    unknown = [lever for lever in levers if lever not in LEVERS and "=" not in lever]
    if mode not in MODES or unknown:
        raise ValueError(
            f"a case is one of {', '.join([*MODES, *PEERS])} and +key=value of its configuration, ours also +lever "
            f"({', '.join(LEVERS)}), but {(unknown or [name])[0]!r} is none"
        )
    settings = [*MODES[mode], *(one for lever in levers for one in LEVERS.get(lever, (lever,)))]
    return Case(name, tuple(settings))


def cases_named(names: str) -> list[Case]:
    """Of a comma-separated list. Raises ValueError."""
    return [case_named(name.strip()) for name in names.split(",") if name.strip()]


def lengths_named(names: str) -> list[str]:
    """Of a comma-separated list: numbers of tokens and `tail`. Raises ValueError."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name != TAIL and not (name.isdecimal() and int(name) > 0):
            raise ValueError(f"lengths are numbers of tokens or {TAIL}, but {name!r} is none")
    return found


@dataclass(frozen=True)
class Phase:
    """Steps of a run with completions of one kind of length; those from `first` to `last` count."""

    tokens: str
    start: int
    first: int
    last: int
    end: int


def phases_of(tokens: Sequence[str], ahead: int, warmup: int, steps: int) -> list[Phase]:
    """One after the other, steps counted from 1. Beside the last ones of a phase the next one's batches are sampled,
    so they do not count; the last phase has them too, for what was sampled beside the steps before is then known."""
    found, start = [], 1
    for name in tokens:
        first = start + max(warmup, ahead + 1 if ahead else 0)
        last = first + steps - 1
        found.append(Phase(name, start, first, last, last + ahead))
        start = last + ahead + 1
    return found


def groups_of(tokens: Sequence[str], apart: bool) -> list[list[str]]:
    """Lengths that one of our runs goes through: all fixed ones, since a start takes longer than their steps."""
    fixed = [name for name in tokens if name != TAIL]
    groups = [[name] for name in fixed] if apart else [fixed]
    return [group for group in [*groups, [name for name in tokens if name == TAIL]] if group]
