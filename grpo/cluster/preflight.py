"""`grpo preflight`: every check, on every node side by side, so that what is missing has a name before actors wait.

Without `cluster.address` nothing is started: this machine is looked at as the one node that it will be.
"""

import contextlib
import logging
import os
import platform
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ray

from grpo.checkpoint.commit import checkpoints_url
from grpo.cluster import private_folder
from grpo.cluster.nodes import ray_nodes
from grpo.cluster.probes import HERE, LocalProbe, NodeProbes, Probes
from grpo.cluster.ray_private import OwnPath
from grpo.config import Config
from grpo.config.text import short
from grpo.errors import ConfigError, GrpoError, Interrupted
from grpo.plan.memory import make_plan
from grpo.plan.placement import Node, cpus_alone, place
from grpo.plan.preflight import inputs, links, nodes, sizes
from grpo.plan.preflight.facts import Facts, look
from grpo.plan.preflight.probe import Probe
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, judge
from grpo.run import shell
from grpo.store import open_store

NODE_SECONDS = 30.0  # for one more node, after the last that has joined
LONGEST = 500  # characters of what Ray says


def preflight(config: Config) -> list[Check]:
    """All checks, in the order in which they are told. Raises nothing for what they find."""
    if config.cluster.address is None:
        driver = look(config)
        cpus = float(cpus_alone(config, os.cpu_count() or 1))
        here = Node(HERE, platform.node(), "127.0.0.1", None, cpus, float(len(driver.gpus)))
        return [_shell(config), *_checks(config, driver, [here], LocalProbe())]
    return _on_cluster(config, look(config, weights=False))


def preflight_inputs(config: Config) -> list[Check]:
    """What the run reads, as this machine sees it; neither a cluster nor a GPU is needed. Raises nothing, as above."""
    return _inputs(Site(config, device_of(config, []), [], {}, look(config, weights=False)))


def _inputs(site: Site) -> list[Check]:
    read = [inputs.model(site), *inputs.data(site), inputs.secrets(site)]
    return [*read, *inputs.services(site.config), *inputs.reward_code(site.config)]


def _shell(config: Config) -> Check:
    """What of the shell would end a local Ray, what is without effect, and what decides something."""
    problems = [Problem("warning", "", text) for text in shell.obstacles()]
    if not shell.home():
        problems.append(Problem("warning", "", "no home folder to write to: set HF_HOME for a cache that lasts"))
    try:
        place = private_folder.check(config.run.dir)
    except ConfigError as error:
        return judge("shell", [Problem("failed", "", str(error)), *problems], "")
    ignored, told = shell.ignored(config.cluster.environment), shell.told(os.environ)
    found = [f"Ray's folder goes to {place}"]
    found += [f"without effect: {', '.join(ignored)} (cluster.environment)"] if ignored else []
    found += [f"in effect: {', '.join(told)}"] if told else []
    return judge("shell", problems, "; ".join(found), "raise the limits")


def _on_cluster(config: Config, driver: Facts) -> list[Check]:
    with contextlib.ExitStack() as ending:
        try:
            ending.enter_context(_connected(str(config.cluster.address)))
        except Interrupted:
            raise
        except Exception as error:  # as in session.py: Ray raises plain ones
            lost = "failed" if "mismatch" in str(error) or "uthentication" in str(error) else "missing"
            said = short(" ".join(str(error).split()), most=LONGEST)
            text = f"cannot reach the cluster at {config.cluster.address!r}: {said}; check cluster.address"
            return [Check("ray", lost, text), *_checks(config, driver, [], LocalProbe())]  # type: ignore[arg-type]
        found = _wait_for_nodes(config)
        probes = NodeProbes([node for node in found if node.hosts])
        ending.callback(probes.close)
        text = f"Ray {ray.__version__}, {len(found)} nodes: {', '.join(map(str, found[:4]))}"
        return [Check("ray", "ok", text), *_checks(config, driver, found, probes)]


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, job_config=OwnPath())
        signal.signal(signal.SIGTERM, ours)  # Ray puts its own there
        yield
    except SystemError as error:  # how a waiting ray.wait reports what a signal handler raised
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise
    finally:
        ray.shutdown()


def _wait_for_nodes(config: Config) -> list[Node]:
    """The nodes, once there is room for all actors.

    A role without any node gets `deadlines.start`: its pods are still on their way, in SidecarMode or after the loss
    of a head. Where nodes are there and too small, one that helps must join within NODE_SECONDS of the last.
    """
    began = changed = time.monotonic()
    known: set[str] = set()
    told = ""
    while True:
        found, now = ray_nodes(config), time.monotonic()
        if {node.id for node in found} != known:
            known, changed = {node.id for node in found}, now
        placed = place(config, device_of(config, found), found)
        missing = {role: count for role, count in placed.missing.items() if count}
        absent = [role for role in missing if not any(node.may_host(role) for node in found)]
        patience = began + config.deadlines.start if absent else changed + min(NODE_SECONDS, config.deadlines.start)
        if not missing or now > patience:
            return found
        lacking = " and ".join(f"{count} x {role}" for role, count in missing.items())
        if lacking != told:
            told = lacking
            print(f"waiting {patience - now:.0f} s at most for room for {lacking}", flush=True)
        time.sleep(1.0)


def device_of(config: Config, found: Sequence[Node]) -> str:
    """Where the actors will run, as a session decides it."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if any(node.gpus for node in found) else "cpu"


def _checks(config: Config, driver: Facts, found: Sequence[Node], probes: Probes) -> list[Check]:
    device = device_of(config, found)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": device})})
    able = [node for node in found if node.hosts]
    asked = time.time()
    facts = probes.ask(None, Probe.look, config) if able else {}
    site = Site(config, device, able, facts, driver)
    skews = {node.name: _skew(seen.clock, asked) for node, seen in site.known()}
    checks = [*nodes.layout(site), *nodes.room(site), nodes.labels(site), nodes.versions(site)] if found else []
    checks += [*_against_plan(site), *_storage(site, probes), *_inputs(site)]
    checks += [links.interfaces(site), _connections(site, probes), links.clocks(skews)]
    return [_answers(site, probes), *checks] if len(able) > 1 else checks


def _skew(clock: float, asked: float) -> float:
    """Seconds that a node's clock lies outside of the time in which it was asked; the answer is here by now."""
    return min(0.0, clock - asked) + max(0.0, clock - time.time())


def _answers(site: Site, probes: Probes) -> Check:
    problems = []
    for node in site.nodes:
        if text := probes.unanswered.get(node.id):
            other = any(name in text for name in ("ModuleNotFoundError", "ImportError", "AttributeError"))
            said = f"{text}; grpo is missing or another version there" if other else text
            problems.append(Problem("failed" if other else "missing", node.name, said))
    return judge("answers", problems, f"from all {len(site.nodes)} nodes", "look at the pod's log and events")


def _against_plan(site: Site) -> list[Check]:
    if site.driver.model.problem:  # the check of the model says so; the hub would be asked again and again
        return [Check("plan", "warning", "not made without the model, so memory and space are not checked")]
    try:
        made = make_plan(site.config)
    except ConfigError as error:
        return [Check("plan", "warning", f"{error}; memory and space are not checked")]
    checks = [sizes.gpus(site)] if site.device == "cuda" else []
    checks += [sizes.shared_memory(site, made), sizes.memory(site, made)] if site.facts else []
    return [*checks, sizes.space(site, made, storage_url(site.config))]


def storage_url(config: Config) -> str:
    """Where checkpoints go, absolute."""
    return open_store(checkpoints_url(config.checkpoint.dir, Path(config.run.dir))).url


def _storage(site: Site, probes: Probes) -> list[Check]:
    """The driver and every node of the trainer write, and each reads what the other wrote."""
    config, driver = site.config, Probe("driver")
    url, folder = storage_url(config), f".preflight-{secrets.token_hex(8)}"
    names = {node.id: node.name for node, _ in site.of("trainer")}
    with _as_before(url, folder):
        problems = [Problem("failed", "driver", text) for text in [driver.write(url, folder)] if text]
        if not problems:
            problems = list(_shared(probes, names, url, folder, driver))
    way_out = "all need the same folder: a volume with ReadWriteMany, or checkpoint.dir: s3://bucket/prefix"
    if url.startswith("s3://"):
        way_out = "look at the bucket's name, endpoint and credentials, and at networkPolicy.extraEgress"
    if any("ermission denied" in problem.text for problem in problems):
        way_out = "it belongs to somebody else: use a storage class that applies fsGroup, or storage.fixPermissions"
    who = f"the driver and every node of the trainer ({len(names)})" if names else "the driver"
    checks = [judge("checkpoints", problems, f"{url}: written, flushed, renamed and read by {who}", way_out)]
    others = {"run.dir": config.run.dir if config.checkpoint.dir else None, "run.results": config.run.results}
    return checks + [_place(key, place, driver, folder) for key, place in others.items() if place]


def _shared(probes: Probes, names: Mapping[str, str], url: str, folder: str, driver: Probe) -> Iterator[Problem]:
    """What is wrong on the nodes `names` (by id), after the driver has written."""
    written = probes.ask(list(names), Probe.write, url, folder)
    unseen = probes.ask(list(names), Probe.read, url, folder, ["driver"])
    for node, name in names.items():
        if text := written.get(node, "no answer"):
            yield Problem("failed", name, text)
        elif unseen.get(node):
            yield Problem("failed", name, "does not see what the driver wrote")
        elif driver.read(url, folder, [node]):
            yield Problem("failed", "driver", f"does not see what {name} wrote")


def _place(key: str, place: str, driver: Probe, folder: str) -> Check:
    url = open_store(place).url
    with _as_before(url, folder):
        problems = [Problem("failed", "driver", text) for text in [driver.write(url, folder)] if text]
    return judge(key, problems, f"{url}: written and read by the driver", f"set {key} to a place that lasts")


@contextlib.contextmanager
def _as_before(url: str, folder: str) -> Iterator[None]:
    """Takes away `folder` and the folders above it that were not there."""
    local = "://" not in url
    new = [path for path in (Path(url), *Path(url).parents) if not path.exists()] if local else []
    try:
        yield
    finally:
        with contextlib.suppress(GrpoError):
            open_store(url).delete(folder)
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _connections(site: Site, probes: Probes) -> Check:
    """Every node connects to every other, as NCCL's and gloo's rings may."""
    if len(site.facts) < 2:
        return links.connections({}, 0)
    known = {node.id: node for node, _ in site.known()}
    ports = probes.ask(None, Probe.listen)
    places = [(known[node].address, port) for node, port in ports.items()]
    errors = {}
    for node, answers in probes.ask(None, Probe.connect, places).items():
        for target, text in zip(ports, answers, strict=True):
            if text and target != node:
                errors[known[node].name, known[target].name] = text
    probes.ask(None, Probe.close)
    return links.connections(errors, len(ports) * (len(ports) - 1))
