"""Probes for `preflight`: one on each node, asked side by side, each with a deadline."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo.cluster.waiting import last_line
from grpo.plan.placement import Node
from grpo.plan.preflight.probe import Probe

ANSWER_SECONDS = 90.0  # a node has to start a worker first
HERE = "here"
P = ParamSpec("P")
R = TypeVar("R")
Verb = Callable[Concatenate[Probe, P], R]
Only = Sequence[str] | None
"""Ids of the nodes to ask; None: all."""


class Probes(Protocol):
    """One probe on each node; `unanswered` says why a node has not answered."""

    unanswered: dict[str, str]

    def ask(self, only: Only, verb: Verb[P, R], *args: P.args, **kwargs: P.kwargs) -> dict[str, R]:
        """Answers of a method of `Probe` by node id, side by side."""
        ...


class LocalProbe:
    """This machine is all there is."""

    def __init__(self) -> None:
        self.unanswered: dict[str, str] = {}
        self.probe = Probe(HERE)

    def ask(self, only: Only, verb: Verb[P, R], *args: P.args, **kwargs: P.kwargs) -> dict[str, R]:
        return {} if only is not None and HERE not in only else {HERE: verb(self.probe, *args, **kwargs)}


class NodeProbes:
    """An actor without resources on each node."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.unanswered: dict[str, str] = {}
        make: Any = ray.remote(num_cpus=0, max_restarts=0)(Probe)
        there = {node.id: NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes}
        self.actors = {node: make.options(scheduling_strategy=place).remote(node) for node, place in there.items()}

    def ask(self, only: Only, verb: Verb[P, R], *args: P.args, **kwargs: P.kwargs) -> dict[str, R]:
        asked = [node for node in self.actors if node not in self.unanswered and (only is None or node in only)]
        refs = {getattr(self.actors[node], verb.__name__).remote(*args, **kwargs): node for node in asked}
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_SECONDS) if refs else ([], [])
        self.unanswered |= {refs[ref]: f"no answer within {ANSWER_SECONDS:g} s" for ref in late}
        answers: dict[str, R] = {}
        for ref in done:
            try:
                answers[refs[ref]] = ray.get(ref)
            except RayError as error:
                self.unanswered[refs[ref]] = last_line(error)
        return answers

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.actors.values():
            with contextlib.suppress(RayError):
                ray.kill(actor)
