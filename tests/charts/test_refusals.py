"""What charts/grpo refuses: a typo at any depth, and with a sentence what Kubernetes would refuse late."""

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from charts.generate.schema import CHART
from tests import helm as charts
from tests.helm import HELMS, job, refusal, rules, run_yaml, template

GPU = {"limits": {"nvidia.com/gpu": 1}}


def scraped(timeout: str, interval: str) -> dict[str, Any]:
    return {"monitoring": {"podMonitor": {"scrapeTimeout": timeout, "interval": interval}}}


EVERY_API = "apiregistration.k8s.io/v1", "ray.io/v1/RayJob"


def apis(*versions: str) -> list[str]:
    return [part for version in versions for part in ("--api-versions", version)]


# What does not fit


def on_gpus(engines: int = 1, ranks: int = 1, **more: Any) -> dict[str, Any]:
    config = {"cluster": {"device": "auto"}, "rollout": {"engines": engines}, "train": {"ranks": ranks}}
    return {"config": config, "rollout": {"resources": GPU}, "trainer": {"resources": GPU}} | more


def test_gpus_that_fit() -> None:
    template(on_gpus())
    template(on_gpus(2, 2, rollout={"replicas": 2, "resources": GPU}, trainer={"replicas": 2, "resources": GPU}))
    shared = on_gpus(2)
    shared["config"]["rollout"]["gpus_per_engine"] = 0.5
    template(shared)
    slices = {"resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}}
    template(on_gpus() | {"rollout": slices, "trainer": slices})


@pytest.mark.parametrize(
    "values, sentence",
    [
        (on_gpus(2), "2 of the 2 engines share a pod and need 1 GPUs each"),
        (on_gpus(1, 3, trainer={"replicas": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}}), "2 of the 3 ranks"),
        ({"config": {"cluster": {"device": "auto"}}, "rollout": {"resources": GPU}}, "a pod of trainer has 0"),
        ({"config": {"cluster": {"device": "cuda"}}}, "a pod of rollout has 0"),
        ({"rollout": {"replicas": 2}}, "rollout.replicas is 2, but config.rollout.engines is 1"),
        ({"trainer": {"replicas": 3}}, "trainer.replicas is 3, but config.train.ranks is 1"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(values)


def test_a_tensor_parallel_engine_needs_all_its_gpus_in_one_pod() -> None:
    values = on_gpus()
    values["config"]["rollout"]["tensor_parallel"] = 2
    assert "need 2 GPUs each (config.rollout.tensor_parallel, gpus_per_engine, engines_per_gpu)" in refusal(values)


def together(engines: int, ranks: int, gpus: int, replicas: int = 1, **rollout: Any) -> dict[str, Any]:
    trainer = {"replicas": replicas, "resources": {"limits": {"nvidia.com/gpu": gpus}}}
    values = on_gpus(engines, ranks, rollout={"replicas": 0}, trainer=trainer)
    values["config"]["rollout"] |= rollout
    return values


def test_engines_and_ranks_of_one_pod_must_fit_it_together() -> None:
    template(together(4, 4, 8))
    template(together(12, 4, 8, engines_per_gpu=3))
    template(together(2, 4, 8, tensor_parallel=2))
    template(together(8, 8, 8, replicas=2))
    shared = together(1, 1, 1, gpus_per_engine=0.4)
    shared["config"]["train"]["gpus_per_rank"] = 0.5
    template(shared)
    assert "5 engines of 1 GPUs and 4 ranks of 1 share the trainer's pods, but 1 of 8" in refusal(together(5, 4, 8))
    assert "share the trainer's pods" in refusal(together(13, 4, 8, engines_per_gpu=3))
    assert "must find them in one" in refusal(together(4, 8, 8, replicas=2, tensor_parallel=2))
    taking_turns = together(6, 2, 2, engines_per_gpu=3)
    taking_turns["config"]["cluster"]["colocate"] = True
    template(taking_turns)
    taking_turns["rollout"] = {"replicas": 1, "resources": GPU}
    assert "config.cluster.colocate puts engines and ranks on the same GPUs" in refusal(taking_turns)
    assert "there are 2 engines and ranks" in refusal(together(1, 1, 1, replicas=3))


@pytest.mark.parametrize("several", [3, 16])
def test_engines_that_share_gpus_need_so_many_pods(several: int) -> None:
    values = on_gpus(several + 1, rollout={"replicas": 2, "resources": GPU})
    values["config"]["rollout"]["engines_per_gpu"] = several
    template(values)
    values["rollout"]["replicas"] = 3
    assert f"replicas is 3, but the {several + 1} engines share 2 GPUs" in refusal(values)
    values["config"]["rollout"]["engines"] = 2 * several
    values["rollout"]["replicas"] = 1
    assert f"{2 * several} of the {2 * several} engines share a pod" in refusal(values)


def test_null_is_the_default() -> None:
    nothing = {"metrics": {"port": None}, "checkpoint": {"dir": None}, "rollout": {"gpus_per_engine": None}}
    values = on_gpus()
    values["config"]["rollout"]["gpus_per_engine"] = None
    assert yaml.safe_load(run_yaml(template({"config": nothing})))["metrics"]["port"] == 9400
    template(values)
    values["config"]["rollout"]["engines"] = 2
    assert "need 1 GPUs each" in refusal(values)


# Sentences


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"image": {"registry": ""}}, "image.registry is empty"),
        ({"job": {"submissionMode": "SidecarMode"}}, "SidecarMode does not go with podSecurity restricted"),
        ({"job": {"submissionMode": "K8sJobMode"}, "scheduler": {"name": "kai", "queue": "q"}}, "does not go with"),
        ({"queue": {"name": "q"}, "scheduler": {"name": "volcano", "queue": "q"}}, "would both hold the gang back"),
        ({"queue": {"priorityClass": "p"}}, "queue.priorityClass is set without queue.name"),
        ({"scheduler": {"name": "volcano"}}, "scheduler.queue is empty"),
        ({"scheduler": {"networkTopologyMode": "hard"}}, "are Volcano's"),
        ({"job": {"rayVersion": "2.52.1"}}, "job.rayVersion 2.52.1 is too old"),
        ({"queue": {"name": "q"}, **rules(("DeleteSelf", 1))}, "does not go with queue.name"),
        (rules(("DeleteSelf", 1), ("DeleteSelf", 2)), "has DeleteSelf twice"),
        (rules(("DeleteCluster", 1), ("DeleteWorkers", 2)), "DeleteCluster must not come before DeleteWorkers"),
        ({"rdma": {"enabled": True, "resources": {"rdma/hca": 1}}}, "IPC_LOCK, which podSecurity restricted"),
        ({"podSecurity": "baseline", "rdma": {"enabled": True, "resources": {"rdma/hca": 1}}}, "podSecurity baseline"),
        ({"rdma": {"enabled": True, "ipcLock": False}}, "rdma.resources names none"),
        ({"trainer": {"volumes": [{"name": "d", "hostPath": {"path": "/d"}}]}}, "trainer.volumes: d is a hostPath"),
        ({"config": {"cluster": {"address": "ray://other:10001"}}}, "config.cluster.address is ray://other:10001"),
        ({"config": {"metrics": {"port": 0}}}, "config.metrics.port is 0"),
        ({"config": {"metrics": {"port": 8080}}}, "config.metrics.port is 8080"),
        ({"storage": {"enabled": False}}, "storage.enabled is false"),
        ({"storage": {"fixPermissions": True}}, "which podSecurity restricted does not admit"),
        ({"podSecurity": "baseline", "runAsUser": None, "storage": {"fixPermissions": True}}, "Set runAsUser and"),
        ({"storage": {"accessModes": ["ReadWriteOnce"]}}, "head and trainer write checkpoints from different nodes"),
        ({"config": {"run": {"dir": "/data/run"}}}, "config.run.dir is /data/run, which is on no volume"),
        ({"config": {"checkpoint": {"dir": "/c"}}}, "config.checkpoint.dir is /c, which is on no volume"),
        ({"head": {"objectStoreMemory": "10Mi"}}, "Ray needs at least 75Mi"),
        ({"head": {"objectStoreMemory": "1Gi"}}, "must fit head.shmSize (256Mi)"),
        ({"rollout": {"shmSize": "3Gi"}}, "rollout.shmSize (3Gi) counts as memory of the pod"),
        ({"head": {"env": [{"name": "RAY_ADDRESS", "value": "x"}]}}, "head.env sets RAY_ADDRESS"),
        ({"trainer": {"env": [{"name": "RAY_AUTH_MODE", "value": "x"}]}}, "trainer.env sets RAY_AUTH_MODE"),
        ({"head": {"resources": GPU}}, "head.resources asks for a GPU"),
        (scraped("1m", "15s"), "scrapeTimeout is 1m, longer than monitoring.podMonitor.interval (15s)"),
        (scraped("1001ms", "1s"), "scrapeTimeout is 1001ms, longer"),
    ],
)
def test_refused_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    said = refusal(values)
    assert sentence in said and "Use --debug" not in said.split(sentence)[0]


@pytest.mark.parametrize(
    "values",
    [
        rules(("DeleteWorkers", 0), ("DeleteCluster", 60), ("DeleteSelf", 60)),
        {"storage": {"accessModes": ["ReadWriteOnce"]}, "config": {"checkpoint": {"dir": "s3://bucket/run"}}},
        {"storage": {"enabled": False}, "config": {"checkpoint": {"dir": "s3://bucket/run"}}},
        {"rdma": {"enabled": True, "ipcLock": False, "resources": {"vpc.amazonaws.com/efa": 1}}},
        {"podSecurity": "baseline", "job": {"submissionMode": "SidecarMode"}},
        {
            "config": {"run": {"dir": "/data/run"}},
            "head": {"volumes": [{"name": "d", "nfs": {"server": "s", "path": "/"}}],
                     "volumeMounts": [{"name": "d", "mountPath": "/data"}]},
        },
    ],
)  # fmt: skip
def test_taken(values: dict[str, Any]) -> None:
    template(values)


@pytest.mark.parametrize("program", HELMS)
def test_a_cluster_without_kuberay_gets_the_command_that_installs_it(program: str) -> None:
    said = refusal({}, *apis("apiregistration.k8s.io/v1"), program=program)
    assert "the KubeRay operator is missing" in said
    assert re.search(r"^  helm install kuberay-operator .*--version \S+ --namespace kuberay-system", said, re.MULTILINE)
    template({}, *apis(*EVERY_API), program=program)


def test_a_queue_needs_kueue() -> None:
    queue = {"queue": {"name": "q"}}
    assert "this cluster has no Kueue" in refusal(queue, *apis(*EVERY_API))
    template(queue, *apis(*EVERY_API, "kueue.x-k8s.io/v1beta1"))
    template(queue)


# Typos


FREE = {"labels", "annotations", "nodeSelector", "matchLabels", "limits", "requests", "extraObjects"}
"""Mappings whose keys are the user's."""

VALUES: dict[str, Any] = {
    "nameOverride": "n",
    "config": {
        "model": {"path": "m", "dtype": "float32"},
        "run": {"steps": 3},
        "rewards": [{"function": "gsm8k", "weight": 1}],
        "train": {"betas": [0.9, 0.95]},
        "deadlines": {"start": 3},
    },
    "image": {"registry": "r", "controller": {"tag": "t"}, "pullSecrets": [{"name": "s"}]},
    "job": {"labels": {"a": "b"}, **rules(("DeleteCluster", 3))["job"]},
    "head": {"resources": {"limits": {"cpu": 1}, "claims": [{"name": "c"}]}, "nodeSelector": {"a": "b"}},
    "rollout": {
        "tolerations": [{"key": "k", "operator": "Exists"}],
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 1,
                        "podAffinityTerm": {
                            "topologyKey": "zone",
                            "labelSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]},
                        },
                    }
                ]
            }
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "envFrom": [{"configMapRef": {"name": "c"}}],
        "volumes": [{"name": "v", "projected": {"sources": [{"secret": {"items": [{"key": "k", "path": "p"}]}}]}}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "initContainers": [{"name": "i", "image": "i", "securityContext": {"seLinuxOptions": {"level": "l"}}}],
    },
    "trainer": {"annotations": {"a": "b"}},
    "storage": {"size": "1Gi"},
    "secrets": {"s3": {"name": "s"}},
    "queue": {"name": ""},
    "scheduler": {"name": "none"},
    "networkPolicy": {
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 443}]}],
        "extraIngress": [{"from": [{"podSelector": {"matchLabels": {"a": "b"}}}]}],
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "rdma": {"enabled": False},
    "monitoring": {
        "podMonitor": {"interval": "5s"},
        "rules": {"thresholds": {"stepStalledSeconds": 3}},
        "dashboards": {"labels": {"a": "b"}},
    },
    "extraObjects": [{"kind": "x"}],
}


def closed_places() -> list[tuple[str | int, ...]]:
    return [path for path, _ in charts.places(VALUES) if not FREE & {str(key) for key in path}]


def with_typo(path: tuple[str | int, ...]) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    here: Any = values
    for key in path:
        here = here[key]
    here["tpyo"] = 1
    return values


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))


def test_good_values_pass(validator: jsonschema.Draft7Validator) -> None:
    assert list(validator.iter_errors(VALUES)) == []


def test_a_typo_at_any_depth_is_refused(validator: jsonschema.Draft7Validator) -> None:
    paths = closed_places()
    assert len(paths) > 60 and max(len(path) for path in paths) >= 8
    assert [path for path in paths if validator.is_valid(with_typo(path))] == []


@pytest.mark.parametrize("program", HELMS)
def test_helm_refuses_a_typo_at_any_depth(program: str) -> None:
    template(VALUES, profile=None, program=program)
    by_depth = {len(path): path for path in closed_places()}
    for path in by_depth.values():
        assert "'tpyo' not allowed" in refusal(with_typo(path), profile=None, program=program), path


@pytest.mark.parametrize(
    "values, where",
    [
        ({"config": {"run": {"steps": "many"}}}, "/config/run/steps"),
        ({"config": {"algorithm": {"loss": "ppo"}}}, "/config/algorithm/loss"),
        ({"config": {"run": {"name": "UPPER"}}}, "/config/run/name"),
        ({"config": {"train": {"betas": [0.9]}}}, "/config/train/betas"),
        ({"head": {"resources": {"limits": {"memroy": "1Gi"}}}}, "memroy"),
        ({"rollout": {"nodeSelector": {"pool": 1}}}, "/rollout/nodeSelector/pool"),
        ({"rollout": {"replicas": -1}}, "/rollout/replicas"),
        ({"trainer": {"replicas": 0}}, "/trainer/replicas"),
        ({"fullnameOverride": "a" * 39}, "/fullnameOverride"),
        ({"podSecurity": "strict"}, "/podSecurity"),
        ({"job": {"activeDeadlineSeconds": 0}}, "/job/activeDeadlineSeconds"),
        ({"storage": {"size": "10 GB"}}, "/storage/size"),
        ({"job": {"deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}}}, "/condition"),
        ({"trainer": {"labels": {"app.kubernetes.io/name": "x"}}}, "app.kubernetes.io/name"),
        ({"monitoring": {"rules": {"thresholds": {"zeroVarianceRatio": "high"}}}}, "zeroVarianceRatio"),
        ({"monitoring": {"rules": {"groups": {"life": "off"}}}}, "/monitoring/rules/groups/life"),
        ({"monitoring": {"runbookUrl": "docs/runbooks.md"}}, "/monitoring/runbookUrl"),
        ({"monitoring": {"runbookUrl": "https://wiki.example.com/x#top"}}, "/monitoring/runbookUrl"),
        ({"monitoring": {"podMonitor": {"scrapeTimeout": "ten"}}}, "/monitoring/podMonitor/scrapeTimeout"),
        ({"monitoring": {"podMonitor": {"relabelings": [{"action": "shred"}]}}}, "/relabelings/0/action"),
        ({"monitoring": {"podMonitor": {"metricRelabelings": [{"source_labels": ["a"]}]}}}, "source_labels"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], where: str) -> None:
    assert where in refusal(values)


def test_the_model_is_the_only_key_that_must_be_there() -> None:
    least = {"image": {"registry": "r"}, "config": {"model": {"path": "m"}}}
    template(least, profile=None)
    for nothing in ({}, {"config": {}}, {"config": {"model": {}}}):
        said = refusal({"image": {"registry": "r"}} | nothing, profile=None)
        assert "No model is named. Set config.model.path" in said


def test_no_values_at_all_name_what_is_needed_and_a_profile_that_has_it() -> None:
    said = refusal({}, profile=None)
    for part in ("image.registry is empty", "No model is named", "-f charts/grpo/ci/cpu-smoke-values.yaml"):
        assert part in said


ELASTIC: dict[str, object] = {
    "rollout": {"replicas": 1, "maxReplicas": 4, "autoscaling": {"enabled": True}},
    "config": {"rollout": {"engines": {"min": 1, "max": 4}}},
}


def test_engines_that_come_and_go_have_pods_that_do() -> None:
    spec = job(ELASTIC)["spec"]["rayClusterSpec"]
    rollout, trainer = spec["workerGroupSpecs"]
    assert [rollout[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 4]
    assert [trainer[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 1]
    assert rollout["rayStartParams"]["num-cpus"] == "1" and spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True
    assert rollout["template"]["spec"]["automountServiceAccountToken"] is False
    assert "enableInTreeAutoscaling" not in job({})["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rollout": {"maxReplicas": None}}, "the number of rollout pods is fixed"),
        ({"rollout": {"replicas": 5}}, "rollout.maxReplicas is 4, below rollout.replicas \\(5\\)"),
        ({"rollout": {"maxReplicas": 5}}, "rollout.maxReplicas is 5, but config.rollout.engines is 4"),
        ({"config": {"rollout": {"engines": {"min": 2}}}}, "min is 2, but the run starts with 1 rollout pods of 1"),
        ({"config": {"rollout": {"engines": {"min": 9}}}}, "has min 9 above max 4"),
        ({"config": {"rollout": {"engines": 4}}}, "rollout.maxReplicas is 4, but config.rollout.engines is 4"),
        ({"queue": {"name": "gpus"}}, "rollout.autoscaling does not go with queue.name"),
    ],
)
def test_pods_and_engines_that_do_not_go_together_are_refused(changed: dict[str, object], expected: str) -> None:
    assert re.search(expected, refusal(merged(ELASTIC, changed)))


def merged(base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    both = {key: base.get(key) for key in (*base, *changed)}
    return {
        key: merged(value, changed[key])
        if isinstance(value, dict) and isinstance(changed.get(key), dict)
        else changed.get(key, value)
        for key, value in both.items()
    }
