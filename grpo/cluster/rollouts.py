"""The engines as one sampler: who gets which prompts, and what becomes of those of a lost engine."""

import hashlib
from collections.abc import Callable, Sequence

from grpo.cluster.context import RunContext
from grpo.cluster.fleet import Fleet, Slot, State
from grpo.errors import ClusterError, GrpoError
from grpo.interfaces import Call, Engine
from grpo.run.faults import fault_point
from grpo.types import Group, Prompt, Sampling


def engine_lives(engine: Engine, seconds: float) -> Call[object]:
    """Asks for more than the process: the engine must make a token or say that it is busy."""
    return engine.health(seconds)


class FleetRollouts:
    """Engines that share each call's prompts evenly; what a lost one has not answered goes to the others."""

    def __init__(self, context: RunContext, fleet: Fleet, ensure: Callable[[], int]) -> None:
        """`ensure` waits for at least one healthy engine and returns the version that engines sample from."""
        self.context, self.fleet, self.ensure = context, fleet, ensure

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        """G samples of each prompt, in order, whoever made them."""
        seed = self.context.config.run.seed
        requests = [(prompt, request_seed(seed, step, place, prompt.id)) for place, prompt in enumerate(prompts)]
        groups: dict[int, Group] = {}
        version = self.ensure()
        while missing := [place for place in range(len(requests)) if place not in groups]:
            groups |= self._share_out(missing, requests, sampling, step)
            if len(groups) < len(requests) and (newer := self.ensure()) != version:  # all were lost; new ones are newer
                version, groups = newer, {}
        return [groups[place] for place in range(len(requests))]

    def _share_out(
        self, places: Sequence[int], requests: Sequence[tuple[Prompt, int]], sampling: Sampling, step: int
    ) -> dict[int, Group]:
        """The groups of those places whose engine has answered."""
        slots = self.fleet.of(State.HEALTHY)
        shares = [places[index :: len(slots)] for index in range(len(slots))]
        calls = [
            slot.engine.generate([requests[place] for place in share], sampling)
            for slot, share in zip(slots, shares, strict=True)
        ]
        fault_point("generate.dispatched", step)
        groups: dict[int, Group] = {}
        lost: dict[Slot, ClusterError] = {}
        seconds = self.context.config.deadlines.rollout
        results = self.context.workers.outcomes(calls, seconds, "rollout", ask=engine_lives)
        for slot, share, result in zip(slots, shares, results, strict=True):
            if isinstance(result, ClusterError):
                lost[slot] = result
            elif isinstance(result, GrpoError):
                raise result
            else:
                groups |= zip(share, result, strict=True)
        self.fleet.lose(lost)
        return groups


def request_seed(run_seed: int, step: int, place: int, prompt_id: str) -> int:
    """Seed of a prompt's first sample: the same for the same run, step, place in it and prompt, whoever answers.

    A small data set can bring one prompt twice into a step; its place keeps the samples apart.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{place}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**31 - 2**16)
