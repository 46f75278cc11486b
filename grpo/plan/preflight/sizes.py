"""Memory, shared memory and storage against the plan."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from grpo.plan.memory import GIB, Plan, copies, gib, gpu_problems, make_plan
from grpo.plan.placement import ROLES, Node, Role, place
from grpo.plan.preflight.facts import Facts
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, judge
from grpo.store import open_store


def gpus(site: Site) -> Check:
    """The plan against the smallest GPU; not for a run on the CPU."""
    problems, sizes = [], [size for _, facts in site.known() for size in facts.gpus]
    for node, facts in site.known():
        if node.gpus and not facts.gpus:
            problems.append(Problem("warning", node.name, f"Ray counts {node.gpus:g} GPUs, but nvidia-smi shows none"))
    if sizes:
        smallest = min(sizes) / GIB
        found = gpu_problems(make_plan(site.config, gpu_gib=round(smallest, 1)), site.config)
        problems += [Problem("failed", "", text) for text in found]
    well = f"{len(sizes)} of {gib(min(sizes))} or more: the plan fits" if sizes else "not known: see grpo plan"
    return judge("GPU memory", problems, well, "see grpo plan")


def shared_memory(site: Site, made: Plan) -> Check:
    """/dev/shm holds Ray's objects and the queues between an engine's processes."""
    problems = []
    for node, facts, counts in _hosts(site):
        queues = sum(count * (made.pods[role].shm - made.object_store) for role, count in counts.items())
        if facts.shm < queues:
            text = f"/dev/shm has {gib(facts.shm)}, engines and ranks there need {gib(queues)}"
            problems.append(Problem("failed", node.name, text))
        elif facts.shm < queues + node.object_store:
            text = f"/dev/shm has {gib(facts.shm)}, less than Ray's object store ({gib(node.object_store)})"
            problems.append(Problem("warning", node.name, text))
    least = min((facts.shm for _, facts in site.known()), default=0)
    return judge("/dev/shm", problems, f"{gib(least)} or more", "raise shmSize of the group or lower objectStoreMemory")


def memory(site: Site, made: Plan) -> Check:
    """The container's limit against what the actors there will take.

    Failed only if what is certain (weights, states, cache) is too much; the rest is an estimate and a warning.
    """
    problems = []
    on_cpu = site.device == "cpu"
    engine = made.sync_bytes + int(site.config.rollout.kv_cache_gib * GIB)
    states = made.weights + made.reference + made.gradients + made.optimizer
    for node, facts, counts in _hosts(site):
        certain = on_cpu * (counts["rollout"] * engine + counts["trainer"] * states)
        need = node.object_store + sum(count * _needs(made, role) for role, count in counts.items())
        if sum(counts.values()) and need > facts.memory:
            actors = " and ".join(f"{count} x {role}" for role, count in counts.items() if count)
            text = f"{gib(facts.memory)} of memory, the plan for {actors} is {gib(need)}"
            problems.append(Problem("failed" if certain > facts.memory else "warning", node.name, text))
    least = min((facts.memory for _, facts in site.known()), default=0)
    return judge("memory", problems, f"{gib(least)} or more on each node", "raise the group's limit; see grpo plan")


def _needs(made: Plan, role: Role) -> int:
    """Memory of an actor with its part of /dev/shm, which counts as the pod's; Ray's objects come once a node."""
    return made.pods[role].memory + made.pods[role].shm - made.object_store


def _hosts(site: Site) -> Iterator[tuple[Node, Facts, dict[Role, int]]]:
    """Nodes that have answered, with the actors that each would get."""
    placed = place(site.config, site.device, site.nodes)
    for node, facts in site.known():
        yield node, facts, {role: placed.hosted[role][node.id] for role in ROLES}


def space(site: Site, made: Plan, url: str) -> Check:
    """Free bytes for all checkpoints that may lie there at once, less those that do already. A bucket has no end."""
    store, needed = open_store(url), made.volume
    if not store.renames:
        share = made.checkpoint // site.config.train.ranks
        short = [(node.name, facts.temporary) for node, facts in site.of("trainer") if facts.temporary < share]
        problems = [
            Problem("failed", name, f"{gib(free)} free for temporary files, a rank's share is {gib(share)}")
            for name, free in short
        ]
        return judge("space", problems, "a bucket; ranks have room for their files", "enlarge the volume at TMPDIR")
    there = sum(store.size(name) or 0 for name in store.names()) if Path(url).is_dir() else 0
    folder = next(path for path in (Path(url), *Path(url).absolute().parents) if path.exists())
    free = psutil.disk_usage(str(folder)).free
    rule = f"{copies(site.config)} checkpoints of {gib(made.checkpoint)} (checkpoint.keep + 2)"
    well = f"{gib(free)} free for {rule}"
    text = f"{gib(free)} free, {rule} need {gib(needed - there)} more"
    problems = [] if free >= needed - there else [Problem("failed", "", text)]
    return judge("space", problems, well, "enlarge the volume, or lower checkpoint.keep")
