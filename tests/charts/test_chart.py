"""charts/grpo, rendered: names, placement, the job, fences, volumes."""

import http.server
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from charts.generate import manifests, schema
from charts.generate.schema import CHART
from charts.generate.tools import ROOT
from grpo import cli
from grpo.config.diff import FREE, FREE_SECTIONS
from grpo.config.load import load_config
from tests import helm as charts
from tests.helm import HELMS, RDMA, SMOKE, SPOT, container, env, helm, job, one, pods, rules, run_yaml, template

PROFILES = manifests.PROFILES
needs_definitions = pytest.mark.skipif(not charts.DEFINITIONS.is_dir(), reason=f"no {charts.DEFINITIONS}")

# What is rendered


@pytest.mark.parametrize("profile", PROFILES)
def test_all_helms_render_the_same(profile: str) -> None:
    assert all(template(profile=profile, program=program) == template(profile=profile) for program in HELMS)


@needs_definitions
@pytest.mark.parametrize("values", [{}, {"podSecurity": "baseline"}, {"job": {"submissionMode": "K8sJobMode"}}])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_object_passes_the_strictest_schema(profile: str, values: dict[str, Any]) -> None:
    if profile in (RDMA, "two-hosts") and "podSecurity" in values:
        values = {"podSecurity": "privileged", "job": {"submissionMode": "HTTPMode"}}
    for item in template(values, profile=profile):
        charts.validate(item)


@needs_definitions
def test_the_strict_schema_refuses_a_typo() -> None:
    rayjob = job()
    rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["nodeSelectr"] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodeSelectr"):
        charts.validate(rayjob)


def test_lint_finds_nothing() -> None:
    for program in HELMS:
        done = helm("lint", str(CHART), "--strict", "--kube-version", schema.KUBERNETES, program=program)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_the_configuration_is_passed_through_whole(profile: str, tmp_path: Path) -> None:
    objects = template(profile=profile)
    name = one(objects, "RayJob")["metadata"]["labels"]["grpo.dev/run"]
    (tmp_path / "run.yaml").write_text(run_yaml(objects))
    config = load_config(tmp_path / "run.yaml")
    assert (config.run.name, config.run.dir, config.run.grace_seconds) == (name, f"/runs/{name}", 110)
    assert (config.cluster.address, config.metrics.port) == ("auto", 9400)
    given = yaml.safe_load((CHART / "ci" / f"{profile}-values.yaml").read_text())["config"]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    wanted = load_config(tmp_path / "given.yaml").model_dump()
    got = config.model_dump()
    filled = {"run": ("name", "dir", "grace_seconds"), "cluster": ("address",), "metrics": ("port",)}
    for tree in (wanted, got):
        for section, keys in filled.items():
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    assert got == wanted


def test_the_smoke_profile_is_the_quickstart() -> None:
    smoke = yaml.safe_load((CHART / "ci" / f"{SMOKE}-values.yaml").read_text())["config"]
    quickstart = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    for section in ("data", "rewards", "rollout", "train"):
        both = smoke[section] if section == "rewards" else {k: smoke[section][k] for k in smoke[section]}
        assert both == quickstart[section] if section == "rewards" else both.items() <= quickstart[section].items()


def test_the_user_wins_where_both_make_sense() -> None:
    own = {"run": {"name": "mine", "dir": "/runs/elsewhere", "grace_seconds": 5}, "metrics": {"port": 9500}}
    objects = template({"config": own})
    config = yaml.safe_load(run_yaml(objects))
    assert {key: config["run"][key] for key in own["run"]} == own["run"]
    assert config["metrics"]["port"] == 9500
    ports = {port["name"]: port["containerPort"] for port in container(pods(one(objects, "RayJob"))["head"])["ports"]}
    assert ports["grpo-metrics"] == 9500
    assert one(objects, "RayJob")["metadata"]["labels"]["grpo.dev/run"] == "mine"


# Names


@pytest.mark.parametrize(
    "release, start",
    [
        ("grpo", "grpo-"),
        ("math", "math-grpo-"),
        ("7b.v2", "r7b-v2-grpo-"),
        ("a" * 52, f"{'a' * 29}-"),
        (f"{'b' * 28}-{'c' * 20}", f"{'b' * 28}-"),
    ],
)
def test_names_are_what_kuberay_takes(release: str, start: str) -> None:
    name = job(release=release)["metadata"]["name"]
    assert len(name) <= 47 and name.startswith(start)
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_long_names_stay_apart() -> None:
    first, second = (job(release="a" * 51 + end)["metadata"]["name"] for end in "xy")
    assert first[:38] != second[:38]


def names(values: dict[str, Any], **options: Any) -> tuple[str, str]:
    rayjob = job(values, **options)
    return rayjob["metadata"]["name"], rayjob["metadata"]["labels"]["grpo.dev/run"]


def test_another_image_is_another_job_of_the_same_run_and_another_config_another_run() -> None:
    before = names({})
    again = names({})
    image = names({"image": {"worker": {"tag": "new"}}})
    nodes = names({"rollout": {"nodeSelector": {"pool": "other"}}})
    config = names({"config": {"run": {"steps": 21}}})
    kept = names({"config": {"run": {"steps": 21, "name": "kept"}}})
    assert again == before
    assert image[0] != before[0] != nodes[0] != image[0] and image[1] == before[1] == nodes[1]
    assert config[0] != before[0] and config[1] != before[1]
    assert kept[1] == "kept"


MAY_CHANGE: dict[str, object] = {
    "run.results": "/runs/results",
    "run.restart": "2",
    "run.allow_drift": ["run.seed"],
    "run.lease_seconds": 40,
    "run.grace_seconds": 40,
    "run.max_recoveries": 5,
    "reward_code.workers": 3,
    "reward_code.isolation": "none",
    "rollout.engines": 2,
    "metrics.port": 9500,
    "deadlines.health": 70,
    "cluster.device": "auto",
    "checkpoint.every": 7,
    "sft.steps": 7,
}


def test_what_a_resume_may_change_is_known_to_the_chart() -> None:
    """But for other folders, in which nothing of the run is there to go on with, and for the start from nothing."""
    free = {key for key in FREE | FREE_SECTIONS if key not in ("run.dir", "run.resume")}
    assert {key if key in FREE else key.partition(".")[0] for key in MAY_CHANGE} == free


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_a_resume_may_change_is_another_job_of_the_same_run(key: str) -> None:
    section, _, name = key.partition(".")
    before, after = names({}), names({"config": {section: {name: MAY_CHANGE[key]}}})
    assert after[1] == before[1] and after[0] != before[0]


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("checkpoint", {"dir": "/runs/other"}),
        ("run", {"dir": "/runs/other"}),
        ("run", {"resume": "never"}),
        ("rollout", {"temperature": 0.9}),
        ("train", {"ranks": 2}),
    ],
)
def test_other_folders_and_other_results_are_another_run(section: str, keys: dict[str, Any]) -> None:
    assert names({"config": {section: keys}})[1] != names({})[1]


RANGE: dict[str, Any] = {
    "config": {"rollout": {"engines": {"min": 2, "max": 8}}},
    "rollout": {"replicas": 1, "maxReplicas": 4},
}


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_group_of_engines_that_come_and_go_may_shrink_to_the_fewest(replicas: int) -> None:
    spec = job(RANGE | {"rollout": {"replicas": replicas, "maxReplicas": 4}})["spec"]["rayClusterSpec"]
    [rollout, _] = spec["workerGroupSpecs"]
    assert [rollout[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [replicas, 1, 4]


def test_the_version_of_the_chart_changes_no_job(tmp_path: Path) -> None:
    subprocess.run([HELMS[0], "package", str(CHART), "-d", str(tmp_path), "--version", "9.9.9"], check=True)
    done = helm("template", "grpo", str(next(tmp_path.glob("*.tgz"))), "--kube-version", schema.KUBERNETES)
    assert one(list(yaml.safe_load_all(done.stdout)), "RayJob")["metadata"]["name"] == job()["metadata"]["name"]


# Placement


@pytest.mark.parametrize("actors, replicas, cpus", [(1, 1, "1"), (4, 2, "2"), (5, 2, "3"), (3, 3, "1")])
def test_actors_spread_evenly(actors: int, replicas: int, cpus: str) -> None:
    values = {
        "config": {"rollout": {"engines": actors}, "train": {"ranks": actors}},
        "rollout": {"replicas": replicas},
        "trainer": {"replicas": replicas},
    }
    for group in job(values)["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["rayStartParams"]["num-cpus"] == cpus
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == replicas
        assert group["numOfHosts"] == 1


def test_without_rollout_pods_engines_live_in_the_trainers() -> None:
    values = {"config": {"rollout": {"engines": 4}, "train": {"ranks": 2}}, "rollout": {"replicas": 0}}
    [group] = job(values)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["groupName"] == "trainer" and "labels" not in group, "a node of no role takes both"
    assert group["rayStartParams"]["num-cpus"] == "6"
    notes = helm("install", "--dry-run=client", "grpo", str(CHART), values=values).stdout
    assert "1 x trainer with 4 engines and 2 ranks" in notes and "rollout with" not in notes


def test_the_head_offers_nothing_and_groups_carry_their_role() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert head == {
        "num-cpus": "0",
        "num-gpus": "0",
        "dashboard-host": "0.0.0.0",
        "metrics-export-port": "8080",
        "object-store-memory": str(100 * 2**20),
    }
    assert [group["labels"] for group in cluster["workerGroupSpecs"]] == [
        {"grpo.dev/role": "rollout"},
        {"grpo.dev/role": "trainer"},
    ]
    assert all("num-gpus" not in group["rayStartParams"] for group in cluster["workerGroupSpecs"])
    other = job({"config": {"cluster": {"role_label": "team/part"}}})["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["labels"] for group in other] == [{"team/part": "rollout"}, {"team/part": "trainer"}]


def test_groups_have_their_own_nodes() -> None:
    group = {
        "nodeSelector": {"pool": "x"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
    }
    found = pods(job({"rollout": group}))
    assert {key: found["rollout"]["spec"][key] for key in group} == group
    assert found["trainer"]["spec"]["nodeSelector"] == {"pool": "trainer"}
    assert "runtimeClassName" not in found["trainer"]["spec"]
    assert {pod["spec"]["restartPolicy"] for pod in found.values()} == {"Never"}


# The job


@pytest.mark.parametrize(
    "level, asked, mode",
    [
        ("restricted", "auto", "HTTPMode"),
        ("baseline", "auto", "SidecarMode"),
        ("privileged", "auto", "SidecarMode"),
        ("baseline", "HTTPMode", "HTTPMode"),
        ("restricted", "K8sJobMode", "K8sJobMode"),
    ],
)
def test_submission_mode(level: str, asked: str, mode: str) -> None:
    spec = job({"podSecurity": level, "job": {"submissionMode": asked}})["spec"]
    assert spec["submissionMode"] == mode
    assert ("submitterPodTemplate" in spec) == (mode == "K8sJobMode")


def test_retries_and_deadlines() -> None:
    spec = job(profile=SPOT)["spec"]
    keys = ("backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds")
    assert [spec[key] for key in keys] == [20, 604800, 1800]
    assert "activeDeadlineSeconds" not in job({"job": {"activeDeadlineSeconds": None}})["spec"]


@pytest.mark.parametrize("profile, seconds", [(SPOT, 60), (RDMA, 60), (SMOKE, 3600)])
def test_pods_go_when_the_job_ends_whatever_it_ended_with(profile: str, seconds: int) -> None:
    """KubeRay's rules know no STOPPED, which is what an end for good is told as; Kueue takes nothing else either."""
    spec = job(profile=profile)["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, seconds)
    assert "deletionStrategy" not in spec


def test_rules_of_the_users_own_end_a_job_as_they_say_and_nothing_is_told_as_stopped() -> None:
    own = rules(("DeleteCluster", 5))
    spec = job(own)["spec"]
    assert spec["deletionStrategy"] == own["job"]["deletionStrategy"]
    assert "shutdownAfterJobFinishes" not in spec and "ttlSecondsAfterFinished" not in spec
    assert spec["entrypoint"] == "grpo job /etc/grpo/run.yaml --no-stop"


@pytest.mark.parametrize("preflight, more", [(True, ""), (False, " --no-preflight")])
def test_the_entrypoint_needs_no_shell_and_is_a_verb(preflight: bool, more: str, tmp_path: Path) -> None:
    """Ray's supervisor, `ray job submit` and its shell each take it apart in a way of their own."""
    entrypoint = job({"job": {"preflight": preflight}})["spec"]["entrypoint"]
    assert entrypoint == f"grpo job /etc/grpo/run.yaml{more}"
    run_file = tmp_path / "run.yaml"
    run_file.write_text("model: {path: nowhere}\n")
    words = entrypoint.replace("/etc/grpo/run.yaml", str(run_file)).split()[1:]
    called: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo.run.pod.run_verbs", lambda *arguments: called.append(arguments) or 7)
        assert CliRunner().invoke(cli.app, [*words, "--no-stop"]).exit_code == 7
    [(steps, _, stop)] = called
    assert (steps, stop) == ([(verb, run_file) for verb in ["preflight"] * preflight + ["train"]], None)


def test_a_restart_is_another_job_of_the_same_run_that_is_told_so() -> None:
    before, after = template(), template({"job": {"restart": "2"}})
    first, second = one(before, "RayJob"), one(after, "RayJob")
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert first["metadata"]["labels"] == second["metadata"]["labels"]
    assert second["metadata"]["annotations"]["grpo.dev/restart"] == "2"
    runs = [yaml.safe_load(run_yaml(objects))["run"] for objects in (before, after)]
    assert runs[1].pop("restart") == "2" and runs[0] == runs[1]
    own = yaml.safe_load(run_yaml(template({"job": {"restart": "2"}, "config": {"run": {"restart": "own"}}})))
    assert own["run"]["restart"] == "own"


def test_a_driver_that_is_told_to_stop_has_its_whole_grace_period() -> None:
    found = pods(job({"head": {"terminationGracePeriodSeconds": 300}}))
    assert env(found["head"])["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    assert "RAY_JOB_STOP_WAIT_TIME_S" not in env(found["trainer"])


def test_rays_coloured_events_are_off() -> None:
    assert {env(pod)["RAY_SCHEDULER_EVENTS"] for pod in pods(job()).values()} == {"0"}


@pytest.mark.parametrize("role", ["head", "rollout", "trainer"])
def test_a_sidecar_stands_behind_rays_container_in_the_restricted_context(role: str) -> None:
    ship = {"name": "ship", "image": "x", "volumeMounts": [{"name": "tmp", "mountPath": "/logs"}]}
    own = {"name": "own", "image": "y", "securityContext": {"readOnlyRootFilesystem": False}}
    found = pods(job({role: {"sidecarContainers": [ship, own]}}))
    [ray, first, second] = found[role]["spec"]["containers"]
    assert ray["name"] == ("ray-head" if role == "head" else "ray-worker")
    restricted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert first == ship | {"securityContext": restricted}
    assert second["securityContext"] == restricted | {"readOnlyRootFilesystem": False}
    assert {len(pod["spec"]["containers"]) for other, pod in found.items() if other != role} == {1}


def test_kueue_owns_suspend() -> None:
    rayjob = job(profile=SPOT)
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "research"
    assert "suspend" not in rayjob["spec"] and "suspend" not in rayjob["spec"]["rayClusterSpec"]


def test_gang_schedulers_by_labels() -> None:
    volcano = {"name": "volcano", "queue": "q", "priorityClassName": "p", "networkTopologyMode": "hard"}
    labels = job({"scheduler": volcano})["metadata"]["labels"]
    assert labels["volcano.sh/queue-name"] == "q" and labels["ray.io/priority-class-name"] == "p"
    assert labels["volcano.sh/network-topology-mode"] == "hard"
    labels = job({"scheduler": {"name": "kai", "queue": "q"}})["metadata"]["labels"]
    assert labels["kai.scheduler/queue"] == "q" and not any("volcano" in label for label in labels)


# Fences


def every_pod(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rayjob = one(objects, "RayJob")
    submitter = [rayjob["spec"][key] for key in ("submitterPodTemplate",) if key in rayjob["spec"]]
    return [*pods(rayjob).values(), *(item for item in objects if item["kind"] == "Pod"), *submitter]


def unsafe(pod: dict[str, Any]) -> list[str]:
    """What Pod Security restricted would say."""
    spec, found = pod["spec"], []
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if not (set(v) - {"name"}) <= kinds]
    found += [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    if spec["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp")
    for entry in [*spec["containers"], *spec.get("initContainers", [])]:
        context = entry.get("securityContext", {})
        wrong = {
            "escalation": context.get("allowPrivilegeEscalation") is not False,
            "capabilities": context.get("capabilities", {}).get("drop") != ["ALL"],
            "added": bool(set(context.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}),
            "root": not (context.get("runAsNonRoot") or spec["securityContext"].get("runAsNonRoot")),
            "uid": spec["securityContext"].get("runAsUser") == 0,
            "root file system": not context.get("readOnlyRootFilesystem"),
        }
        found += [f"{entry['name']}: {what}" for what, is_wrong in wrong.items() if is_wrong]
    return found


@pytest.mark.parametrize("mode", ["HTTPMode", "K8sJobMode"])
def test_every_pod_passes_restricted(mode: str) -> None:
    values = {"job": {"submissionMode": mode}, "rollout": {"initContainers": [{"name": "fetch", "image": "x"}]}}
    found = every_pod(template(values))
    assert len(found) == (5 if mode == "HTTPMode" else 6)
    assert [unsafe(pod) for pod in found] == [[]] * len(found)


def test_only_rdma_adds_a_capability() -> None:
    found = pods(job(profile=RDMA))
    assert unsafe(found["head"]) == []
    for role in ("rollout", "trainer"):
        assert unsafe(found[role]) == ["ray-worker: added"]
        resources = container(found[role])["resources"]
        assert resources["limits"]["vpc.amazonaws.com/efa"] == resources["requests"]["vpc.amazonaws.com/efa"] == 4
        assert env(found[role])["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "vpc.amazonaws.com/efa" not in container(found["head"])["resources"]["limits"]


def test_the_cluster_may_pick_the_user() -> None:
    context = pods(job({"runAsUser": None, "fsGroup": None}))["head"]["spec"]["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_no_pod_of_the_run_has_a_token() -> None:
    objects = template()
    assert one(objects, "ServiceAccount", "grpo")["automountServiceAccountToken"] is False
    found = [(pod["metadata"].get("name", "run"), pod["spec"]) for pod in every_pod(objects)]
    tokens = {name: spec["automountServiceAccountToken"] for name, spec in found}
    assert tokens == {"run": False, "grpo-test-run": False, "grpo-test-cluster": True}
    [rule] = one(objects, "Role")["rules"]
    assert rule["verbs"] == ["get"] and rule["resourceNames"] == [one(objects, "RayJob")["metadata"]["name"]]


def test_rays_token_is_asked_for_everywhere() -> None:
    rayjob = job()
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert {env(pod)["RAY_AUTH_MODE"] for pod in pods(rayjob).values()} == {"token"}


def test_secrets_go_only_to_the_roles_that_need_them() -> None:
    named = {"huggingface": {"name": "hf"}, "wandb": {"name": "wb"}, "s3": {"name": "aws", "key": "creds"}}
    found = pods(job({"secrets": named}))
    variables = ("HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "WANDB_API_KEY_FILE")
    assert {role: [name for name in variables if name in env(pod)] for role, pod in found.items()} == {
        "head": list(variables),
        "rollout": ["HF_TOKEN_PATH"],
        "trainer": ["HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE"],
    }
    assert env(found["head"])["WANDB_API_KEY_FILE"] == "/etc/grpo/secrets/wandb/api-key"
    assert not [name for pod in found.values() for name, value in env(pod).items() if isinstance(value, dict)]
    for pod in found.values():
        mounted = {mount["name"]: mount for mount in container(pod)["volumeMounts"]}
        secrets = {volume["name"]: volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume}
        assert all(mounted[name]["readOnly"] and secret["defaultMode"] == 0o440 for name, secret in secrets.items())
        assert env(pod)["HF_TOKEN_PATH"] == f"{mounted['huggingface-secret']['mountPath']}/token"
    assert secrets["s3-secret"]["items"] == [{"key": "creds", "path": "credentials"}]
    assert not any("secret" in volume for pod in pods(job()).values() for volume in pod["spec"]["volumes"])


def test_network_policy() -> None:
    objects = template()
    run = {"app.kubernetes.io/name": "grpo", "app.kubernetes.io/instance": "grpo"}
    every, head = one(objects, "NetworkPolicy", "grpo")["spec"], one(objects, "NetworkPolicy", "head")["spec"]

    def opened(spec: dict[str, Any], way: str, peer: str) -> list[tuple[Any, list[int]]]:
        found = []
        for rule in spec.get(way, []):
            ports = [port["port"] for port in rule.get("ports", [])]
            found += [(next(iter(entry.values())).get("matchLabels", entry), ports) for entry in rule[peer]]
        return found

    def space(name: str) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": name}

    assert every["policyTypes"] == ["Ingress", "Egress"] and every["podSelector"]["matchLabels"] == run
    assert opened(every, "ingress", "from") == [(run, []), (space("monitoring"), [8080])]
    dns = {"ipBlock": {"cidr": "169.254.20.10/32"}}
    assert opened(every, "egress", "to") == [(run, []), (space("kube-system"), [53, 53]), (dns, [53, 53])]
    assert head["podSelector"]["matchLabels"] == run | {"app.kubernetes.io/component": "head"}
    assert opened(head, "ingress", "from") == [(space("kuberay-system"), [8265]), (space("monitoring"), [9400])]
    labels = [pod["metadata"]["labels"] for pod in every_pod(objects)]
    assert [run.items() <= entry.items() for entry in labels] == [True, True, True, False, True]
    assert not [item for item in template({"networkPolicy": {"enabled": False}}) if item["kind"] == "NetworkPolicy"]


def test_releases_do_not_select_each_others_pods() -> None:
    first, second = (one(template(release=name), "NetworkPolicy", "head")["spec"]["podSelector"] for name in ("a", "b"))
    assert first != second


# Volumes and ends


def test_runs_are_kept_on_a_volume_of_head_and_trainer() -> None:
    objects = template()
    claim = one(objects, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {}
    for role, pod in pods(one(objects, "RayJob")).items():
        sources = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts[role] = [sources[m["name"]] for m in container(pod)["volumeMounts"] if m["mountPath"] == "/runs"]
    claimed = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}]
    assert mounts == {"head": claimed, "rollout": [], "trainer": claimed}
    own = template({"storage": {"existingClaim": "mine"}})
    assert not [item for item in own if item["kind"] == "PersistentVolumeClaim"]
    trainer = pods(one(own, "RayJob"))["trainer"]["spec"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "mine"}} in trainer["volumes"]
    assert "annotations" not in one(template({"storage": {"keep": False}}), "PersistentVolumeClaim")["metadata"]


def test_a_bucket_leaves_the_volume_to_the_head() -> None:
    found = {role: pod["spec"]["volumes"] for role, pod in pods(job(profile=RDMA)).items()}
    assert {"name": "runs", "emptyDir": {}} in found["trainer"]
    assert any(volume["name"] == "runs" and "persistentVolumeClaim" in volume for volume in found["head"])


def test_the_run_is_nobody_on_the_node() -> None:
    contexts = [pod["spec"]["securityContext"] for pod in every_pod(template())]
    assert {(context["runAsUser"], context["fsGroup"]) for context in contexts} == {(10001, 10001)}
    assert {context["fsGroupChangePolicy"] for context in contexts} == {"OnRootMismatch"}  # takes older volumes over


def test_an_init_container_gives_the_volume_to_the_run_where_that_is_asked_for() -> None:
    fix = {"podSecurity": "baseline", "storage": {"fixPermissions": True}}
    own = {"name": "own", "image": "x"}
    found = pods(job(fix | {"head": {"initContainers": [own]}}))
    first, second = found["head"]["spec"]["initContainers"]
    assert (first["name"], second["name"]) == ("fix-permissions", "own")
    assert first["command"] == ["bash", "-c", "chown 10001:10001 /runs && chmod 2770 /runs"]
    context = first["securityContext"]
    assert (context["runAsUser"], context["runAsNonRoot"]) == (0, False)
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}
    assert first["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert "initContainers" not in found["trainer"]["spec"] and "initContainers" not in pods(job())["head"]["spec"]


@pytest.mark.parametrize("profile", PROFILES)
def test_no_line_ends_with_a_space(profile: str) -> None:
    said = helm("template", "grpo", str(CHART), "--kube-version", schema.KUBERNETES, profile=profile).stdout
    assert [line for line in said.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("last, over", [('{"event": "end", "step": 3}', True), ('{"event": "step", "step": 3}', False)])
def test_the_test_of_a_run_that_is_over_passes_without_its_metrics(last: str, over: bool, tmp_path: Path) -> None:
    script = container(one(template({"config": {"run": {"dir": "/runs/own"}}}), "Pod", "test-run"))["command"][-1]
    script = script.replace("/runs/own", str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(f'{{"event": "start"}}\n{last}\n')
    script = (
        script.replace('"/runs/', f'"{tmp_path}/').replace("grpo-head", "localhost").replace("range(30)", "range(1)")
    )
    script = script.replace(":8080", ":1").replace(":9400", ":1").replace("sleep(2)", "sleep(0)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode == 0) == over, done
    assert ("nobody answers, as the run has ended" in done.stdout) == over
    assert over or "does the job run?" in done.stderr


def test_what_is_written_has_a_place_and_shared_memory_a_size() -> None:
    for pod in pods(job()).values():
        mounts = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        assert {"/tmp", "/home/grpo", "/dev/shm"} <= set(mounts)
        [shm] = [volume["emptyDir"] for volume in pod["spec"]["volumes"] if volume["name"] == mounts["/dev/shm"]]
        assert shm == {"medium": "Memory", "sizeLimit": "256Mi"}


def test_every_pod_is_drained_before_it_ends() -> None:
    for pod in pods(job({"trainer": {"terminationGracePeriodSeconds": 300}})).values():
        assert container(pod)["lifecycle"] == {"preStop": {"exec": {"command": ["grpo", "drain"]}}}
    grace = {role: pod["spec"]["terminationGracePeriodSeconds"] for role, pod in pods(job()).items()}
    assert grace == {"head": 120, "rollout": 120, "trainer": 120}
    long = template({"head": {"terminationGracePeriodSeconds": 600}})
    assert yaml.safe_load(run_yaml(long))["run"]["grace_seconds"] == 590


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.answers[self.path])  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def server(answers: dict[str, int]) -> http.server.HTTPServer:
    found = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    found.answers = answers  # type: ignore[attr-defined]
    threading.Thread(target=found.serve_forever, daemon=True).start()
    return found


@pytest.mark.parametrize(
    "agent, driver, healthy",
    [(200, None, True), (200, 200, True), (200, 503, False), (503, 200, False), (None, 200, False), (500, None, False)],
)
def test_liveness(agent: int | None, driver: int | None, healthy: bool) -> None:
    probe = container(pods(job())["head"])["livenessProbe"]
    script = probe["exec"]["command"][-1]
    up = [server({path: code}) for path, code in (("/api/healthz", agent), ("/healthz", driver)) if code]
    ports = [one_server.server_port for one_server in up]
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))  # nobody listens
    places = dict(zip([name for name, code in (("52365", agent), ("9400", driver)) if code], ports, strict=True))
    for name in ("52365", "9400"):
        script = script.replace(f"status {name} ", f"status {places.get(name, silent.getsockname()[1])} ")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    silent.close()
    for one_server in up:
        one_server.shutdown()
        one_server.server_close()
    assert (done.returncode == 0) == healthy, done
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60


def test_ports_have_the_names_that_are_selected_by() -> None:
    found = pods(job())
    head = {port["name"]: port["containerPort"] for port in container(found["head"])["ports"]}
    assert head == {"metrics": 8080, "grpo-metrics": 9400, "dashboard": 8265, "gcs-server": 6379, "client": 10001}
    for role in ("rollout", "trainer"):
        assert container(found[role])["ports"] == [{"name": "metrics", "containerPort": 8080}]


def test_the_heads_service_selects_the_head() -> None:
    objects = template()
    selector = one(objects, "Service")["spec"]["selector"]
    labels = {role: pod["metadata"]["labels"] for role, pod in pods(one(objects, "RayJob")).items()}
    assert [role for role, own in labels.items() if selector.items() <= own.items()] == ["head"]


def test_the_tests_of_helm_are_programs() -> None:
    scripts = [container(item)["command"] for item in template() if item["kind"] == "Pod"]
    assert [command[:2] for command in scripts] == [["python", "-c"]] * 2
    for *_, script in scripts:
        compile(script, "test", "exec")


def test_extra_objects_are_templates() -> None:
    more = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": '{{ include "grpo.fullname" . }}-more'}}
    assert one(template({"extraObjects": [more]}), "Secret")["metadata"]["name"] == "grpo-more"
