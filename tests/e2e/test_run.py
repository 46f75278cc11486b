"""`helm install` and `kubectl apply` to SUCCEEDED, side by side: placement, what Prometheus sees, who reaches what."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import namespace
from tests.e2e.kube import ROOT, Namespace, Prometheus, eventually, nodes, run
from tests.e2e.runs import START_SECONDS, UNDISTURBED, Run, current, install, open_volume, options, show

pytestmark = pytest.mark.timeout(1500)
POOLS = {"headgroup": "system", "rollout": "rollout", "trainer": "trainer"}
STEPS = 60


@dataclass(frozen=True)
class Pair:
    """A release of the chart and, in another namespace, the same profile as a plain file."""

    helm: Run
    plain: Run
    started: float


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    first, second = namespace("grpo-helm"), namespace("grpo-plain")
    spaces = next(first), next(second)
    started = time.time()
    # More steps than the profile, so that there is time to look; alerts and deadlines that do not wait for minutes.
    changed = options({"run.steps": STEPS, "deadlines.health": 50, "deadlines.sync": 60})
    quick = ["--set", "monitoring.rules.thresholds.stepStalledSeconds=20,monitoring.podMonitor.interval=5s"]
    helm = install(spaces[0], *changed, *quick, "--set", "job.submissionMode=K8sJobMode")  # the file's is HTTPMode
    # Ray waits half a minute for its own processes: on few cores two clusters do not start at the same moment.
    for group in POOLS:
        eventually(lambda group=group: spaces[0].ready(group), f"a ready {group}", START_SECONDS, spaces[0].describe)
    for name in ("cpu-smoke-claim.yaml", "cpu-smoke.yaml"):
        spaces[1].kubectl("apply", "-f", str(ROOT / "manifests" / name))
    open_volume(spaces[1])
    yield Pair(helm, current(spaces[1]), started)
    for closing in (first, second):
        next(closing, None)


@pytest.fixture(scope="module")
def running(pair: Pair) -> Pair:
    pair.helm.at_step(1, START_SECONDS)
    show({"seconds from helm install to the first step": round(time.time() - pair.started)})
    pair.plain.at_step(1)
    return pair


def test_pods_run_in_their_pools_under_the_restricted_standard(running: Pair) -> None:
    by_node = nodes()
    for one in (running.helm, running.plain):
        enforced = json.loads(run(["kubectl", "get", "namespace", one.space.name, "-o", "json"]))["metadata"]["labels"]
        assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
        for group, pool in POOLS.items():
            pods = one.space.pods(group)
            assert len(pods) == 1, group
            assert by_node[pods[0]["spec"]["nodeName"]]["metadata"]["labels"]["pool"] == pool
            assert pods[0]["status"]["phase"] == "Running"
            assert pods[0]["spec"]["automountServiceAccountToken"] is False


def test_prometheus_scrapes_controller_ray_and_vllm(running: Pair, prometheus: Prometheus) -> None:
    here = f'namespace="{running.helm.space.name}"'
    eventually(lambda: prometheus.query(f"grpo_step{{{here}}}"), "grpo_step in Prometheus", 120)

    def up() -> list[str]:
        targets = prometheus.query(f"up{{{here}}} == 1")
        return sorted(target["metric"]["endpoint"] for target in targets)

    wanted = ["grpo-metrics", "metrics", "metrics", "metrics"]  # the driver, and Ray on each of three pods
    eventually(lambda: up() == wanted, f"up == 1 of {wanted}", 120, lambda: str(prometheus.query(f"up{{{here}}}")))
    # vLLM's own names, as every dashboard for vLLM asks for them
    eventually(lambda: prometheus.query(f"vllm:generation_tokens_total{{{here}}}"), "vLLM's metrics", 120)
    eventually(lambda: prometheus.query(f"ray_node_mem_used{{{here}}}"), "Ray's metrics", 60)


def test_two_releases_do_not_see_each_other(running: Pair, prometheus: Prometheus) -> None:
    for one in (running.helm, running.plain):
        names = {row["metric"]["run"] for row in prometheus.query(f'grpo_run_info{{namespace="{one.space.name}"}}')}
        assert names <= {one.name}
        expected = prometheus.query(f'grpo_workers{{namespace="{one.space.name}",state="ready"}}')
        assert {row["value"][1] for row in expected} <= {"1"}


def test_the_rules_are_loaded(running: Pair, prometheus: Prometheus) -> None:
    mine = [name for name in prometheus.rules() if running.helm.space.name in name]
    assert len(mine) >= 18, mine
    assert all(rule["health"] in ("ok", "unknown") for name, rule in prometheus.rules().items() if name in mine)


ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
if sys.argv[2:]:
    request.add_header("Authorization", "Bearer " + sys.argv[2])
try:
    print(urllib.request.urlopen(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_ray_refuses_a_caller_without_its_token(running: Pair) -> None:
    space, head = running.helm.space, running.helm.space.ready("headgroup")
    url = "http://127.0.0.1:8265/api/jobs/"
    assert space.execute(head, "python", "-c", ASK, url).strip() == "401"
    assert space.execute(head, "python", "-c", ASK, url, "wrong" * 8).strip() == "403"
    token = "import os, sys; sys.argv.append(os.environ['RAY_AUTH_TOKEN'])\n" + ASK
    assert space.execute(head, "python", "-c", token, url).strip() == "200"
    ray = "import ray; ray.init(address='auto')"
    wrong = ["env", "RAY_AUTH_TOKEN=" + "wrong" * 8, "python", "-c", ray + "; print('in')"]
    assert "in" not in space.execute(head, *wrong, check=False).split()


REACH = """
import socket, sys
for target in sys.argv[1:]:
    host, port = target.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        print(target, "open")
    except OSError as error:
        print(target, "refused" if isinstance(error, ConnectionRefusedError) else "closed")
"""

LISTEN = """
import http.server
http.server.ThreadingHTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def visitor(space: Namespace, image: str) -> str:
    """A pod that is nobody's: it listens on port 8000 and tries others' ports. Its address."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "visitor"},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 4321, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "visitor",
                    "image": image,
                    "command": ["python", "-c", LISTEN],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    space.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    space.kubectl("wait", "--for=condition=Ready", "pod/visitor", "--timeout=60s")
    return space.kubectl("get", "pod", "visitor", "-o", "jsonpath={.status.podIP}")


def reach(space: Namespace, pod: str, targets: list[str]) -> dict[str, str]:
    told = space.execute(pod, "python", "-c", REACH, *targets, seconds=120)
    return dict(line.split() for line in told.splitlines())


@pytest.fixture(scope="module")
def outside(running: Pair) -> Iterator[tuple[Namespace, str]]:
    made = namespace("grpo-visitor")
    space = next(made)
    image = running.helm.space.pods("headgroup")[0]["spec"]["containers"][0]["image"]
    yield space, visitor(space, image)
    next(made, None)


PORTS = (6379, 8265, 10001, 52365, 8080, 9400, 44217)


def test_no_port_is_reached_from_another_namespace(running: Pair, outside: tuple[Namespace, str]) -> None:
    space = outside[0]
    addresses = [pod["status"]["podIP"] for pod in running.helm.space.pods()]
    targets = [f"{address}:{port}" for address in addresses for port in PORTS]
    assert set(reach(space, "visitor", targets).values()) == {"closed"}
    # From inside of the run the same ports answer, so that the test above would see an open one.
    head = next(pod["status"]["podIP"] for pod in running.helm.space.pods("headgroup"))
    inside = reach(running.helm.space, running.helm.space.ready("trainer"), [f"{head}:6379", f"{head}:8265"])
    assert set(inside.values()) == {"open"}


def test_the_monitoring_namespace_reaches_metrics_and_nothing_else(running: Pair) -> None:
    space = Namespace("monitoring")
    image = running.helm.space.pods("headgroup")[0]["spec"]["containers"][0]["image"]
    visitor(space, image)
    try:
        head = next(pod["status"]["podIP"] for pod in running.helm.space.pods("headgroup"))
        seen = reach(space, "visitor", [f"{head}:{port}" for port in (8080, 9400, 6379, 8265)])
        assert list(seen.values()) == ["open", "open", "closed", "closed"]
    finally:
        space.kubectl("delete", "pod", "visitor", "--wait=false")


def test_a_pod_of_the_run_reaches_only_the_run(running: Pair, outside: tuple[Namespace, str]) -> None:
    other = running.plain.space.pods("headgroup")[0]["status"]["podIP"]
    targets = ["kubernetes.default.svc:443", f"{outside[1]}:8000", f"{other}:8080"]
    for group in POOLS:
        seen = reach(running.helm.space, running.helm.space.ready(group), targets)
        assert set(seen.values()) == {"closed"}, group


def test_helm_test_passes_and_the_notes_say_what_to_type(running: Pair) -> None:
    space = running.helm.space
    notes = space.helm("get", "notes", "grpo")
    assert f"kubectl -n {space.name} get rayjob {running.helm.job}" in notes
    space.helm("test", "grpo", "--timeout", "120s", seconds=150)


STOP = """
import psutil
for process in psutil.process_iter():
    line, above = process.cmdline(), process.parent()
    engine = line and "VLLM" in line[0]
    if engine and above and above.cmdline()[0].startswith("ray::VLLMActor"):  # the engine's core, below its actor
        process.suspend()
        print(process.pid)
"""


def test_a_stalled_loop_fires_an_alert_that_ends_with_it(running: Pair, prometheus: Prometheus) -> None:
    one = running.helm
    before = one.step()
    assert one.space.execute(one.space.ready("rollout"), "python", "-c", STOP).strip(), "no engine core was found"
    frozen = time.time()
    eventually(lambda: prometheus.firing("GrpoStepStalled", one.space.name), "GrpoStepStalled", 120, one.space.describe)
    show({"seconds until GrpoStepStalled fired": round(time.time() - frozen)})
    one.at_step(before + 3)  # the frozen engine was found and replaced
    eventually(lambda: not prometheus.firing("GrpoStepStalled", one.space.name), "the end of the alert", 60)
    assert one.rows("recovery")[-1]["role"] == "rollout"
    assert not prometheus.firing("GrpoStepStalled", running.plain.space.name)


def test_both_succeed_and_have_learned(running: Pair) -> None:
    for one, steps in ((running.plain, 40), (running.helm, STEPS)):
        one.succeeded()
        rewards = [row["reward/mean"] for row in one.rows()]
        assert len(rewards) == steps
        first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
        show({"run": one.name, "mean reward of the first and last 5 steps": [round(first, 3), round(last, 3)]})
        assert last > first + 0.1
        UNDISTURBED.update(one.digests() if one is running.plain else {})
        evaluated = [row["eval/accuracy"] for row in one.rows("eval")]
        assert evaluated[-1] > evaluated[0] + 0.1


def test_the_checkpoint_is_on_the_volume(running: Pair) -> None:
    one = running.helm
    listing = one.space.execute(one.space.ready("headgroup"), "ls", f"{one.dir}/checkpoints").split()
    assert f"step_{STEPS:06d}" in listing
    claims = one.space.objects("persistentvolumeclaims")
    assert [claim["status"]["phase"] for claim in claims] == ["Bound"]


def test_the_folder_proves_what_the_run_did(running: Pair) -> None:
    one = running.helm
    said = one.space.execute(one.space.ready("headgroup"), "grpo", "audit", one.dir)
    assert "nothing contradicts" in said and "note:" not in said


def test_an_upgrade_with_another_configuration_is_a_new_run(running: Pair) -> None:
    space, old = running.helm.space, running.helm
    values = str(ROOT / "charts" / "grpo" / "ci" / "cpu-smoke-values.yaml")
    space.helm("upgrade", "grpo", str(ROOT / "charts" / "grpo"), "-f", values, *options({"run.seed": 7}))
    new = eventually(lambda: current(space) if space.job() else None, "the new RayJob", 60)
    assert new is not None and new.job != old.job and new.name != old.name and new.dir != old.dir
    eventually(lambda: space.job_status("rayClusterName"), "a cluster of its own", 60)


def test_uninstall_leaves_the_volume_claim_and_nothing_else(running: Pair) -> None:
    space = running.helm.space
    space.helm("uninstall", "grpo", "--wait", "--timeout", "200s", seconds=220)

    def left() -> list[str]:
        kinds = run(["kubectl", "api-resources", "--verbs=list", "--namespaced", "-o", "name"]).split()
        kinds = [kind for kind in kinds if not kind.startswith("events")]
        found = space.kubectl("get", ",".join(kinds), "-o", "name", "--ignore-not-found").split()
        return [name for name in found if name not in ("configmap/kube-root-ca.crt", "serviceaccount/default")]

    remaining = eventually(lambda: [one for one in [left()] if len(one) == 1], "nothing but the claim", 200)
    assert remaining[0][0].startswith("persistentvolumeclaim/"), remaining
