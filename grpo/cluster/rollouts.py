"""The engines as one sampler: who gets which prompts, and what becomes of those of a lost engine."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from grpo.cluster.context import RunContext
from grpo.cluster.fleet import Fleet, State
from grpo.errors import ClusterError, GrpoError
from grpo.interfaces import Call, Engine
from grpo.run.faults import fault_point
from grpo.types import Group, Prompt, Sampling

ABANDON_SECONDS = 60.0
"""For an engine to drop its requests."""


def engine_lives(engine: Engine, seconds: float) -> Call[object]:
    """Asks for more than the process: the engine must make a token or say that it is busy."""
    return engine.health(seconds)


class FleetRollouts:
    """Engines that share each call's prompts evenly; what a lost one has not answered goes to the others."""

    def __init__(self, context: RunContext, fleet: Fleet, ensure: Callable[[], int], mixes: bool = False) -> None:
        """`ensure` waits for at least one healthy engine and returns the version that engines sample from.

        `mixes`: the groups of a call may be of several versions.
        """
        self.context, self.fleet, self.ensure, self.mixes = context, fleet, ensure, mixes

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int, first: int = 0) -> list[Group]:
        """G samples of each prompt, in order, whoever made them."""
        seed = self.context.config.run.seed
        requests = [(prompt, request_seed(seed, step, place, prompt.id)) for place, prompt in enumerate(prompts, first)]
        groups: dict[int, Group] = {}
        version = self.ensure()
        while missing := [place for place in range(len(requests)) if place not in groups]:
            groups |= self._share_out(missing, requests, sampling, step)
            if len(groups) < len(requests) and (newer := self.ensure()) != version and not self.mixes:
                version, groups = newer, {}  # all were lost; new ones are newer
        return [groups[place] for place in range(len(requests))]

    def _share_out(
        self, places: Sequence[int], requests: Sequence[tuple[Prompt, int]], sampling: Sampling, step: int
    ) -> dict[int, Group]:
        """The groups of all places; without those of engines that were lost when no other was there.

        What a lost one has not answered the others get at once, beside their own.
        """
        groups: dict[int, Group] = {}
        shares: dict[Future[list[Group]], tuple[Engine, Sequence[int]]] = {}
        calls: list[Call[list[Group]]] = []

        def ask(wanted: Sequence[int]) -> None:
            engines = [slot.engine for slot in self.fleet.of(State.HEALTHY)]
            for index, engine in enumerate(engines):
                if share := wanted[index :: len(engines)]:
                    calls.append(engine.generate([requests[place] for place in share], sampling))
                    shares[calls[-1].future] = (engine, share)

        with self.fleet.gate.sampling():
            ask(places)
            fault_point("generate.dispatched", step)
            seconds, workers = self.context.config.deadlines.rollout, self.context.workers
            for ended in workers.as_ended(calls, seconds, "rollout", engine_lives, leaving=self.fleet.leaving):
                lost: dict[Engine, ClusterError] = {}
                missing: list[int] = []
                for future, result in ended.items():
                    if isinstance(result, ClusterError):
                        engine, share = shares[future]
                        lost[engine] = result
                        missing += share
                    elif isinstance(result, GrpoError):
                        raise result
                    else:
                        groups |= zip(shares[future][1], result, strict=True)
                self.fleet.failed(lost)
                ask(missing)
        return groups

    def abandon(self) -> None:
        """Drops what engines still sample for calls that nobody waits for."""
        engines = [slot.engine for slot in self.fleet.of(State.HEALTHY, State.STALE)]
        calls = [engine.abandon() for engine in engines]
        results = self.context.workers.outcomes(calls, ABANDON_SECONDS, "abandon", ask=engine_lives)
        errors = {engine: result for engine, result in zip(engines, results, strict=True) if result}
        self.fleet.failed({engine: error for engine, error in errors.items() if isinstance(error, ClusterError)})
        for error in errors.values():
            if not isinstance(error, ClusterError):
                raise error


def request_seed(run_seed: int, step: int, place: int, prompt_id: str) -> int:
    """Seed of a prompt's first sample: the same for the same run, step, place in it and prompt, whoever answers.

    A small data set can bring one prompt twice into a step; its place keeps the samples apart.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{place}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**31 - 2**16)
