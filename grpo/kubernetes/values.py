"""`grpo k8s values`: the chart's values for a run, with the sizes of `grpo plan`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import grpo
from grpo.config import Config
from grpo.config.text import clean
from grpo.config.yaml import dump
from grpo.errors import ConfigError
from grpo.kubernetes.inputs import Inputs, inputs_of
from grpo.plan.memory import GIB, Plan, Pod
from grpo.plan.placement import Role, actors, grouped
from grpo.plan.table import whole_gib

GPU = "nvidia.com/gpu"
REGISTRY = "registry.example.com/team"
"""Stands for that of the images where none is named."""
CPUS_BESIDE_GPU, FEWEST_BESIDE_GPU = 4, 8
"""Cores of an actor that has GPUs, and of its pod at least: the chart's own number."""
SIDE_FILES = GIB
"""On the volume of runs beside checkpoints: metrics, samples, logs, the report."""

Values = dict[str, object]


@dataclass(frozen=True)
class Group:
    """Pods of a role: how many, and the actors and GPUs of each."""

    replicas: int
    actors: int
    gpus: int


def group_of(config: Config, role: Role, on_gpu: bool, gpus_per_node: int) -> Group:
    """Engines by themselves, as a spot node takes one away at a time; ranks together, as they talk most.

    Actors that share a GPU are in one pod. Raises ConfigError for an actor that fits no node.
    """
    count = actors(config, role)
    if not on_gpu:
        return Group(count, 1, 0)
    groups = grouped(config, "cuda", mixed=False, roles=(role,))
    each = max(group.gpus for group in groups)
    if each > gpus_per_node:
        key = "rollout.tensor_parallel" if role == "rollout" else "train.gpus_per_rank"
        raise ConfigError(
            f"{key}: an actor must fit the GPUs of one node, {gpus_per_node}, but takes {each}; lower it, or raise "
            "--gpus-per-node"
        )
    together = gpus_per_node // each if role == "trainer" else 1
    replicas = math.ceil(len(groups) / together)
    return Group(replicas, math.ceil(count / replicas), math.ceil(len(groups) / replicas) * each)


def pod_values(pod: Pod, store: int, group: Group, cores: str) -> Values:
    """Resources of a pod with so many actors but for GPUs; Ray's object store is there once."""
    shm = math.ceil((group.actors * (pod.shm - store) + store) / GIB) * GIB
    memory = whole_gib(group.actors * pod.memory + shm)
    return {
        "resources": {"requests": {"cpu": cores, "memory": memory}, "limits": {"memory": memory}},
        "shmSize": whole_gib(shm),
        "objectStoreMemory": f"{math.ceil(store / 2**20)}Mi",
    }


def role_values(config: Config, made: Plan, role: Role, gpus_per_node: int) -> Values:
    """Values of `rollout` or `trainer`."""
    on_gpu = made.device != "cpu"
    group = group_of(config, role, on_gpu, gpus_per_node)
    cores = max(FEWEST_BESIDE_GPU, CPUS_BESIDE_GPU * group.actors) if on_gpu else group.actors
    values = with_gpus(pod_values(made.pods[role], made.object_store, group, str(cores)), group.gpus)
    if role == "rollout" and config.rollout.elastic:
        return elastic_values(config, group, values)
    return {"replicas": group.replicas, **values}


def shared_values(config: Config, made: Plan, gpus_per_node: int) -> Values:
    """Values of `trainer` where each GPU has a rank and engines, which live in its pods."""
    group, engines = group_of(config, "trainer", True, gpus_per_node), config.rollout.engines_per_gpu
    engine, rank, store = made.pods["rollout"], made.pods["trainer"], made.object_store
    both = Pod(rank.memory + engines * engine.memory, rank.shm + engines * (engine.shm - store))
    cores = max(FEWEST_BESIDE_GPU, CPUS_BESIDE_GPU * group.actors * (1 + engines))
    return {"replicas": group.replicas, **with_gpus(pod_values(both, store, group, str(cores)), group.gpus)}


def with_gpus(values: Values, gpus: int) -> Values:
    """The same with the GPUs of a pod."""
    resources = values["resources"]
    assert isinstance(resources, dict)
    resources["limits"][GPU] = gpus or None  # null takes away the chart's default
    return values


def elastic_values(config: Config, group: Group, values: Values) -> Values:
    """Pods of a size that the fewest engines fill, as many as the most engines need."""
    return {"replicas": group.replicas, "maxReplicas": math.ceil(config.rollout.most_engines / group.actors), **values}


def values_of(config: Config, made: Plan, registry: str | None, gpus_per_node: int) -> tuple[Values, Inputs]:
    """The values, and what the run reads and writes from where. Raises ConfigError."""
    inputs = inputs_of(config)
    on_gpu, bucket = made.device != "cpu", str(config.checkpoint.dir or "").startswith("s3://")
    values: Values = {"config": inputs.config, **inputs.values, "image": {"registry": registry or REGISTRY}}
    if not on_gpu:
        values["image"] = {"registry": registry or REGISTRY, "worker": {"tag": f"{grpo.__version__}-cpu"}}
    head = Group(1, 1, 0)
    values["head"] = pod_values(made.pods["controller"], made.object_store, head, "2" if on_gpu else "1")
    if config.cluster.colocate and on_gpu:
        values |= {"rollout": {"replicas": 0}, "trainer": shared_values(config, made, gpus_per_node)}
    else:
        values["rollout"] = role_values(config, made, "rollout", gpus_per_node)
        values["trainer"] = role_values(config, made, "trainer", gpus_per_node)
    values["storage"] = {"size": whole_gib(SIDE_FILES + (0 if bucket else made.volume))}
    if bucket:
        values["storage"] = {"size": whole_gib(SIDE_FILES), "accessModes": ["ReadWriteOnce"]}
    if inputs.ports:
        egress = [{"ports": [{"port": port, "protocol": "TCP"} for port in inputs.ports]}]
        values["networkPolicy"] = {"extraEgress": egress}
    return values, inputs


def needed(config: Config, inputs: Inputs, registry: str | None) -> Sequence[str]:
    """What has to be there, or be looked at, before the values are installed."""
    images = f"the images of `make images` in {registry or REGISTRY}"
    return [images if registry else f"{images}: correct image.registry, or give --registry", *inputs.needed]


def values_file(
    config: Config, made: Plan, gpu: str, registry: str | None, gpus_per_node: int
) -> tuple[str, Sequence[str]]:
    """The file, and what has to be there beforehand. Raises ConfigError."""
    values, inputs = values_of(config, made, registry, gpus_per_node)
    asked = needed(config, inputs, registry)
    where = "CPUs" if made.device == "cpu" else f"{gpu} of {made.gpu_gib:g} GiB, {gpus_per_node} to a node"
    lines = [
        f"Run {config.run.name} for charts/grpo; sizes by `grpo plan`, on {where}: the least that a run needs.",
        f"  helm install {config.run.name} charts/grpo -n NAMESPACE -f THIS_FILE",
        "Needed beforehand, beside the KubeRay operator:",
        *(f"  - {line}" for line in asked),
        "Nodes are chosen by head|rollout|trainer.nodeSelector and tolerations; storage.size is for one run.",
    ]
    return "".join(f"# {clean(line)}\n" for line in lines) + dump(values), asked
