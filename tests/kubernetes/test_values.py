"""`grpo k8s values`: the chart takes them, whatever the layout, and the pods have what `grpo plan` says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.config.load import load_config
from grpo.config.yaml import parse
from grpo.errors import ConfigError
from grpo.kubernetes.values import Group, group_of, values_file
from grpo.plan.memory import make_plan
from tests.helm import container, job, one, pods, run_yaml, template, validate
from tests.plan.planned import KEYS, QWEN_1_5B, SMOLLM2

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "quickstart.yaml": None,
    "gsm8k.yaml": QWEN_1_5B,
    "gsm8k-one-gpu.yaml": SMOLLM2,
    "gsm8k-sft.yaml": SMOLLM2,
    "gsm8k-smollm2.yaml": SMOLLM2,
}


def model(folder: Path, sizes: dict[str, Any]) -> str:
    """A folder with the config.json of a model of these sizes."""
    folder.mkdir(parents=True)
    named = {KEYS.get(key, key): value for key, value in sizes.items()}
    (folder / "config.json").write_text(json.dumps(named))
    return str(folder)


def values(config: Config, gpu_gib: float = 80.0, gpus_per_node: int = 8, registry: str | None = None) -> Any:
    text, _ = values_file(config, make_plan(config, gpu_gib), "H100", registry, gpus_per_node)
    return parse(text)


def example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    monkeypatch.chdir(ROOT)
    sizes = EXAMPLES[name]
    named = [f"model.path={model(tmp_path / 'm', sizes)}"] if sizes else []
    return load_config(ROOT / "examples" / name, [*named, *overrides])


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_chart_takes_the_examples(name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = example(name, tmp_path, monkeypatch, f"cluster.device={device}")
    text, _ = values_file(config, make_plan(config, 80.0), "H100", None, 8)
    (tmp_path / "values.yaml").write_text(text)
    objects = template(None, "--values", str(tmp_path / "values.yaml"), profile=None)
    rayjob, made = one(objects, "RayJob"), parse(text)
    validate(rayjob)
    found = pods(rayjob)
    plan = make_plan(config, 80.0)
    for role, group in (("rollout", made["rollout"]), ("trainer", made["trainer"])):
        limits = container(found[role])["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == (None if device == "cpu" else 1)
        assert int(limits["memory"].removesuffix("Gi")) * 2**30 >= plan.pods[role].memory + plan.pods[role].shm
        assert group["replicas"] == (4 if (name, device, role) == ("gsm8k-one-gpu.yaml", "cpu", "rollout") else 1)
    image = container(found["rollout"])["image"]
    assert image.endswith("-cpu") == (device == "cpu")
    inside: Any = parse(run_yaml(objects))
    assert inside["run"]["dir"].startswith("/runs/") and inside["cluster"]["address"] == "auto"
    given_keys = config.model_dump(mode="json", exclude_unset=True)
    for section in ("rollout", "train", "algorithm", "rewards", "eval"):
        assert inside.get(section) == given_keys.get(section)


def test_a_file_says_what_is_needed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = example("gsm8k.yaml", tmp_path, monkeypatch)
    text, asked = values_file(config, make_plan(config, 80.0), "H100", None, 8)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert "#   helm install gsm8k charts/grpo -n NAMESPACE -f THIS_FILE" in comments
    assert asked[0].endswith("registry.example.com/team: correct image.registry, or give --registry")
    assert asked[1].startswith("a claim `models` with the folder m, a copy of")
    assert asked[2] == "the pods reach the hub for the rows (networkPolicy.extraEgress)"
    made: Any = parse(text)
    assert made["model"] == {"claim": "models", "path": "m"} and "path" not in made["config"]["model"]
    assert made["networkPolicy"] == {"extraEgress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]}
    assert values(config, registry="r.example/x")["image"]["registry"] == "r.example/x"


def test_the_model_of_the_images_is_named_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = values(example("quickstart.yaml", tmp_path, monkeypatch))
    assert made["config"]["model"]["path"] == "/opt/grpo/examples/quickstart/model" and "model" not in made


SHARED = {"engines": 4, "gpus_per_engine": 0.12, "memory_utilization": 0.07}
PAIRS = {"engines": 5, "gpus_per_engine": 0.4, "memory_utilization": 0.3}
LAYOUTS = [
    ({"engines": 8, "tensor_parallel": 2}, {"ranks": 16}, 8, Group(8, 1, 2), Group(2, 8, 8)),
    (SHARED, {"gpus_per_rank": 0.5}, 8, Group(1, 4, 1), Group(1, 1, 1)),
    (PAIRS, {"ranks": 3}, 2, Group(3, 2, 1), Group(2, 2, 2)),
    ({"engines": 6, "engines_per_gpu": 3}, {"ranks": 1}, 1, Group(2, 3, 1), Group(1, 1, 1)),
    ({"engines": 1}, {"ranks": 9}, 8, Group(1, 1, 1), Group(2, 5, 5)),
]
SHARES = st.sampled_from([0.1, 0.12, 0.25, 0.3, 0.4, 0.5, 0.9, None])


@pytest.mark.parametrize(("rollout", "train", "node", "engines", "ranks"), LAYOUTS)
def test_layouts(rollout: Any, train: Any, node: int, engines: Group, ranks: Group, tmp_path: Path) -> None:
    base = {
        "model": {"path": model(tmp_path / "m", SMOLLM2)},
        "data": {"source": "arithmetic"},
        "cluster": {"device": "cuda"},
    }
    config = Config.model_validate(base | {"rollout": rollout, "train": train})
    assert group_of(config, "rollout", True, node) == engines and group_of(config, "trainer", True, node) == ranks
    validate(job(values(config, gpus_per_node=node), profile=None))


@given(st.integers(1, 40), SHARES, st.integers(1, 12), st.sampled_from([0.5, 1.0, None]), st.integers(1, 16))
def test_every_layout_has_room_for_its_actors(
    engines: int, share: float | None, ranks: int, rank_share: float | None, node: int
) -> None:
    """As the chart counts: actors of a pod by their share, none idle, no pod above a node."""
    rollout = {"engines": engines, "gpus_per_engine": share, "memory_utilization": 0.05}
    train = {"ranks": ranks, "gpus_per_rank": rank_share}
    config = Config.model_validate({"model": {"path": "./m"}, "rollout": rollout, "train": train})
    for role, count, each in (("rollout", engines, share), ("trainer", ranks, rank_share)):
        group = group_of(config, role, True, node)  # type: ignore[arg-type]
        assert 1 <= group.replicas <= count and group.gpus <= max(node, 1)
        assert group.actors == -(-count // group.replicas) and group.actors * (each or 1) <= group.gpus + 1e-9
        fits = int((1 + 1e-4) / each) if each and each < 1 and role == "rollout" else 1
        assert group.actors <= group.gpus * fits


def test_engines_that_come_and_go_have_as_many_pods_as_they_may_need(tmp_path: Path) -> None:
    base = {"model": {"path": model(tmp_path / "m", SMOLLM2)}, "data": {"source": "arithmetic"}}
    rollout = {"engines": {"min": 2, "max": 6}, "engines_per_gpu": 2}
    made = values(Config.model_validate(base | {"rollout": rollout, "cluster": {"device": "cuda"}}))
    assert (made["rollout"]["replicas"], made["rollout"]["maxReplicas"]) == (1, 3)
    validate(job(made, profile=None))


def test_engines_and_ranks_that_take_turns_are_in_the_same_pods(tmp_path: Path) -> None:
    base = {"model": {"path": model(tmp_path / "m", SMOLLM2)}, "data": {"source": "arithmetic"}}
    rollout, train = {"engines": 8, "engines_per_gpu": 2, "memory_utilization": 0.6}, {"ranks": 4}
    config = Config.model_validate(base | {"rollout": rollout, "train": train, "cluster": {"colocate": True}})
    plan, made = make_plan(config, 80.0), values(config, gpus_per_node=2)
    assert (made["rollout"], made["trainer"]["replicas"]) == ({"replicas": 0}, 2)
    limits = made["trainer"]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 2
    assert int(limits["memory"].removesuffix("Gi")) * 2**30 >= sum(
        2 * count * plan.pods[role].memory for role, count in (("rollout", 2), ("trainer", 1))
    )
    assert made["trainer"]["resources"]["requests"]["cpu"] == "24", "four of each of six actors"
    validate(job(made, profile=None))
    on_cpu = values(config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": "cpu"})}))
    assert (on_cpu["rollout"]["replicas"], on_cpu["trainer"]["replicas"]) == (8, 4)
    validate(job(on_cpu, profile=None))


def test_an_engine_that_fits_no_node_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"path": "./m"}, "rollout": {"tensor_parallel": 16}})
    with pytest.raises(
        ConfigError, match="rollout.tensor_parallel: an actor must fit the GPUs of one node, 8, but takes"
    ):
        group_of(config, "rollout", True, 8)


def test_checkpoints_in_a_bucket_need_little_of_the_volume(tmp_path: Path) -> None:
    base = {"model": {"path": model(tmp_path / "m", SMOLLM2)}, "data": {"source": "arithmetic"}}
    config = Config.model_validate(base | {"checkpoint": {"dir": "s3://bucket/p"}, "cluster": {"device": "cpu"}})
    made = values(config)
    assert made["storage"] == {"size": "1Gi", "accessModes": ["ReadWriteOnce"]}
    assert made["config"]["checkpoint"]["dir"] == "s3://bucket/p"
    claim = one(template(made, profile=None), "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
