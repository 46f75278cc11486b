"""Code, rows, model and what is fetched, by values alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config.load import load_config
from grpo.store.fetch import items_of
from tests import helm as charts
from tests.helm import SMOKE, container, env, one, pods, run_yaml
from tests.helm import validate as strictly

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = {"my_rewards.py": "def score(prompt, completion, answer):\n    return 1.0\n", "pack/inside.py": "X = 'a: b'\n"}
ROWS = {"train.jsonl": '{"question": "1+1", "answer": "2"}\n', "test.jsonl": '{"question": "2+2", "answer": "4"}\n'}


def whole(values: dict[str, Any]) -> dict[str, Any]:
    """With what has to be there; a model, unless the values name one elsewhere."""
    config = values.get("config", {})
    named = {} if {"url", "claim"} & set(values.get("model", {})) else {"model": {"path": "/m"}}
    rows = {} if "data" in values else {"data": {"source": "arithmetic"}}
    image = {"registry": "r"} | values.get("image", {})
    return values | {"image": image, "config": named | rows | config}


def template(values: dict[str, Any]) -> list[dict[str, Any]]:
    return charts.template(whole(values), profile=None)


def refusal(values: dict[str, Any]) -> str:
    return charts.refusal(whole(values), profile=None)


def mounts(rayjob: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """Volume by role, of what is mounted at the path."""
    found = {}
    for role, pod in pods(rayjob).items():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        at = [mount for mount in container(pod)["volumeMounts"] if mount["mountPath"] == path]
        if at:
            found[role] = {key: value for key, value in volumes[at[0]["name"]].items() if key != "name"}
    return found


def names(values: dict[str, Any]) -> tuple[str, str]:
    rayjob = one(template(values), "RayJob")
    return rayjob["metadata"]["name"], rayjob["metadata"]["labels"]["grpo.dev/run"]


def config(values: dict[str, Any], tmp_path: Path) -> Any:
    (tmp_path / "run.yaml").write_text(run_yaml(template(values)))
    return load_config(tmp_path / "run.yaml")


def with_(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in more.items():
        merged[key] = merged.get(key, {}) | value
    return merged


def test_code_of_files(tmp_path: Path) -> None:
    values = {"code": {"files": CODE}, "config": {"rewards": [{"function": "my_rewards:score"}]}}
    objects = template(values)
    [files] = [item for item in objects if item["kind"] == "ConfigMap" and "my_rewards.py" in item["data"]]
    assert files["data"] == {"my_rewards.py": CODE["my_rewards.py"], "pack__inside.py": CODE["pack/inside.py"]}
    at = mounts(one(objects, "RayJob"), "/etc/grpo/code")
    items = [{"key": "my_rewards.py", "path": "my_rewards.py"}, {"key": "pack__inside.py", "path": "pack/inside.py"}]
    assert at == {"head": {"configMap": {"name": files["metadata"]["name"], "items": items}}}
    reward_code = config(values, tmp_path).reward_code
    assert (reward_code.folder, reward_code.readable) == ("/etc/grpo/code", ("/etc/grpo/code",))
    assert reward_code.revision.startswith("sha256:")
    for item in objects:
        strictly(item)


def test_other_code_or_rows_are_another_run() -> None:
    base = names({"code": {"files": CODE}, "data": {"files": ROWS}})
    code = names({"code": {"files": CODE | {"my_rewards.py": "x = 2"}}, "data": {"files": ROWS}})
    rows = names({"code": {"files": CODE}, "data": {"files": ROWS | {"train.jsonl": "{}"}}})
    plain = names({})
    assert len({base, code, rows, plain}) == 4 and len({run for _, run in (base, code, rows, plain)}) == 4
    assert names({"code": {"files": CODE}, "data": {"files": ROWS}}) == base
    foreign = {"code": {"configMap": "mine"}}
    assert names(with_(foreign, code={"revision": "v1"})) != names(with_(foreign, code={"revision": "v2"}))
    inside = {"code": {"imagePath": "/opt/code"}}
    assert names(inside)[1] != names(with_(inside, image={"controller": {"tag": "new"}}))[1]
    pinned = with_(inside, code={"revision": "v1"})
    assert names(pinned)[1] == names(with_(pinned, image={"controller": {"tag": "new"}}))[1]


def test_a_run_with_a_name_of_its_own_refuses_other_code_when_it_resumes(tmp_path: Path) -> None:
    named = {"config": {"run": {"name": "mine"}}}
    first, second = ({**named, "code": {"files": {"a.py": text}}} for text in ("x = 1", "x = 2"))
    assert names(first)[0] != names(second)[0] and names(first)[1] == names(second)[1] == "mine"
    assert config(first, tmp_path).reward_code.revision != config(second, tmp_path).reward_code.revision


@pytest.mark.parametrize(
    ("code", "volume", "folder"),
    [
        ({"configMap": "mine"}, {"configMap": {"name": "mine"}}, "/etc/grpo/code"),
        ({"secret": "mine"}, {"secret": {"secretName": "mine", "defaultMode": 0o440}}, "/etc/grpo/code"),
        ({"imagePath": "/opt/code"}, None, "/opt/code"),
    ],
)
def test_code_from_elsewhere(code: dict[str, Any], volume: Any, folder: str, tmp_path: Path) -> None:
    values = {"code": code, "config": {"reward_code": {"readable": ["/opt/words"]}}}
    at = mounts(one(template(values), "RayJob"), "/etc/grpo/code")
    assert at == ({"head": volume} if volume else {})
    assert config(values, tmp_path).reward_code.readable == (folder, "/opt/words")


@pytest.mark.parametrize(
    ("data", "source", "where", "volume"),
    [
        ({"files": ROWS}, "/etc/grpo/data/{split}.jsonl", "/etc/grpo/data", None),
        ({"configMap": "rows"}, "/etc/grpo/data/{split}.jsonl", "/etc/grpo/data", {"configMap": {"name": "rows"}}),
        ({"configMap": "rows", "path": "{split}.csv"}, "/etc/grpo/data/{split}.csv", "/etc/grpo/data", None),
        (
            {"claim": "sets", "path": "math/{split}.parquet"},
            "/mnt/data/math/{split}.parquet",
            "/mnt/data",
            {"persistentVolumeClaim": {"claimName": "sets", "readOnly": True}},
        ),
        ({"claim": "sets"}, "/mnt/data", "/mnt/data", None),
    ],
)
def test_rows(data: dict[str, Any], source: str, where: str, volume: Any, tmp_path: Path) -> None:
    values = {"data": data}
    at = mounts(one(template(values), "RayJob"), where)
    assert list(at) == ["head"] and (volume is None or at["head"] == volume)
    assert config(values, tmp_path).data.source == source
    own = {"data": data, "config": {"data": {"source": f"{where}/more.jsonl"}}}
    assert config(own, tmp_path).data.source == f"{where}/more.jsonl"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz", ".json"])
def test_inline_rows_of_another_kind(suffix: str, tmp_path: Path) -> None:
    values = {"data": {"files": {f"train{suffix}": "x", f"test{suffix}": "x"}}}
    assert config(values, tmp_path).data.source == f"/etc/grpo/data/{{split}}{suffix}"


def test_a_model_on_a_claim_is_mounted_by_all(tmp_path: Path) -> None:
    values = {"model": {"claim": "models", "path": "qwen/0.5b"}}
    claimed = {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    assert mounts(one(template(values), "RayJob"), "/mnt/model") == dict.fromkeys(
        ("head", "rollout", "trainer"), claimed
    )
    assert config(values, tmp_path).model.path == "/mnt/model/qwen/0.5b"


@pytest.mark.parametrize("url", ["s3://models/qwen", f"hf://Qwen/Qwen2.5-0.5B@{COMMIT}"])
def test_a_model_is_fetched_once_into_a_volume_that_all_share(url: str, tmp_path: Path) -> None:
    values = {"model": {"url": url}, "config": {"data": {"source": "arithmetic"}}}
    objects = template(values)
    rayjob = one(objects, "RayJob")
    path = config(values, tmp_path).model.path
    assert path.startswith("/runs/.cache/model-")
    [listed] = [
        item["data"]["fetch.yaml"] for item in objects if item["kind"] == "ConfigMap" and "fetch.yaml" in item["data"]
    ]
    (tmp_path / "fetch.yaml").write_text(listed)
    [item] = items_of(str(tmp_path / "fetch.yaml"), None, [])
    assert (item.url, item.folder, item.include) == (url, path, ())
    assert list(mounts(rayjob, "/etc/grpo/fetch.yaml")) == ["head"]
    shared = mounts(rayjob, "/runs")
    assert list(shared) == ["head", "rollout", "trainer"] and len({str(volume) for volume in shared.values()}) == 1
    assert {env(pod)["HF_HUB_OFFLINE"] for pod in pods(rayjob).values()} == {"1"}
    assert rayjob["spec"]["entrypoint"] == "grpo job /etc/grpo/run.yaml --fetch /etc/grpo/fetch.yaml"
    for made in objects:
        strictly(made)
    other = config(with_(values, model={"revision": "2"}), tmp_path).model.path
    assert (
        other != path
        and config(with_(values, model={"revision": "2", "path": "a"}), tmp_path).model.path == f"{other}/a"
    )


def test_a_cache_of_its_own_and_rows_beside(tmp_path: Path) -> None:
    rows = f"hf://datasets/openai/gsm8k@{COMMIT}"
    values = {
        "model": {"url": "s3://models/x"},
        "data": {"url": rows, "include": ["main/*"]},
        "cache": {"existingClaim": "c"},
    }
    rayjob = one(template(values), "RayJob")
    claimed = {"persistentVolumeClaim": {"claimName": "c"}}
    assert mounts(rayjob, "/cache") == dict.fromkeys(("head", "rollout", "trainer"), claimed)
    assert list(mounts(rayjob, "/runs")) == ["head", "trainer"]
    found = config(values, tmp_path)
    assert found.model.path.startswith("/cache/model-") and found.data.source.startswith("/cache/data-")


def test_pods_stay_online_where_the_configuration_still_names_the_hub() -> None:
    values = {"model": {"url": "s3://models/x"}, "config": {"data": {"source": "openai/gsm8k", "revision": COMMIT}}}
    assert "HF_HUB_OFFLINE" not in env(pods(one(template(values), "RayJob"))["head"])


def test_nothing_named_changes_nothing() -> None:
    rayjob = one(template({}), "RayJob")
    assert mounts(rayjob, "/etc/grpo/code") == mounts(rayjob, "/mnt/model") == mounts(rayjob, "/cache") == {}
    assert "fetch" not in rayjob["spec"]["entrypoint"]


BIG = {"big.jsonl": "x" * 500_001}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"code": {"files": CODE, "secret": "s"}}, "code names files and secret, but takes one of"),
        ({"code": {"revision": "v1"}}, "code says something about its content, but not where it is"),
        ({"data": {"path": "x"}}, "data says something about its content"),
        ({"data": {"files": {"rows.jsonl": ""}}}, "data.files has no train.jsonl to train on, only rows.jsonl"),
        ({"data": {"files": {"train.jsonl": ""}}}, "data.files has no test.jsonl for the held-out prompts"),
        ({"data": {"files": ROWS | BIG}}, "but Kubernetes and Helm keep at most 1 MiB"),
        ({"code": {"files": {"a/b": "", "a__b": ""}}}, "would be one key of a ConfigMap"),
        ({"data": {"claim": "c"}, "config": {"data": {"source": "arithmetic"}}}, "The rows are named twice"),
        ({"results": {"claim": "c", "url": "s3://bucket/x"}}, "results names claim and url"),
        ({"results": {"claim": "c"}, "config": {"run": {"results": "/runs/x"}}}, "config.run.results is /runs/x, but"),
        ({"config": {"run": {"results": "/x"}}}, "config.run.results is /x, which is on no volume"),
        ({"model": {"claim": "c"}, "config": {"model": {"path": "m"}}}, "The model is named twice"),
        ({"model": {"url": "hf://a/b"}}, "a branch or tag of the hub can move under a run"),
        ({"model": {"url": "hf://a/b@main"}}, "a branch or tag of the hub can move under a run"),
        ({"model": {"url": "gs://a/b"}}, "model.url must be s3://bucket/prefix or hf://owner/name@commit"),
        ({"model": {"url": "s3://key:secret@b/x"}}, "model.url must be s3://"),
        ({"model": {"url": f"hf://datasets/a/b@{COMMIT}"}}, "a data set of the hub. A model is"),
        ({"data": {"url": f"hf://a/b@{COMMIT}"}}, "a model of the hub. A data set is"),
        ({"code": {"files": CODE}, "config": {"reward_code": {"folder": "/x"}}}, "config.reward_code.folder is /x"),
        (
            {"model": {"url": "s3://bucket/x"}, "storage": {"accessModes": ["ReadWriteOnce"]},
             "config": {"checkpoint": {"dir": "s3://b/c"}}},
            "fetched once into a volume that all pods share",
        ),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(values)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"code": {"files": {"../x.py": ""}}}, "'../x.py' does not match"),
        ({"code": {"files": {"/x.py": ""}}}, "'/x.py' does not match"),
        ({"code": {"files": {"x.py": {}}}}, "/code/files"),
        ({"code": {"file": {}}}, "/code"),
        ({"model": {"url": "s3://b/$(x)"}}, "/model/url"),
        ({"data": {"include": "*.json"}}, "/data/include"),
        ({"cache": {"claim": "x"}}, "/cache"),
    ],
)
def test_wrong_values(values: dict[str, Any], where: str) -> None:
    assert where in refusal(values)


def test_the_profile_is_as_it_was() -> None:
    assert yaml.safe_load(run_yaml(charts.template(profile=SMOKE)))["data"]["source"] == "arithmetic"


@pytest.mark.parametrize(
    ("results", "place"),
    [({"claim": "out", "path": "team"}, "/mnt/results/team"), ({"url": "s3://bucket/out"}, "s3://bucket/out")],
)
def test_results_go_where_the_values_say(results: dict[str, Any], place: str, tmp_path: Path) -> None:
    values = {"results": results, "config": {"run": {"name": "mine"}}}
    assert config(values, tmp_path).run.results == place
    at = mounts(one(template(values), "RayJob"), "/mnt/results")
    assert at == ({"head": {"persistentVolumeClaim": {"claimName": "out"}}} if "claim" in results else {})
    assert names(values)[0] != names({"config": {"run": {"name": "mine"}}})[0]
