"""What others may not do: run code, write elsewhere, steer a terminal or a page, read a secret, join the cluster."""

import ast
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from grpo.config import Config
from grpo.config.load import load_config
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, GrpoError, Interrupted
from grpo.observe.progress import RunProgress
from grpo.observe.prometheus import PrometheusMetrics
from grpo.observe.report import write_report
from grpo.plan.memory import make_plan
from grpo.rollout.environment import FORBIDDEN, prepare_environment
from tests.runs import HOSTILE, make_config, make_group, make_stats, write_run
from tests.test_end_to_end import MARK, ROLES, left_behind, marked

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "grpo").rglob("*.py"))

# ---- code from outside ----------------------------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path(__file__).with_name("MARKER").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.fixture(params=["llama", "evil"])
def evil_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A model folder that brings code, for a type that transformers knows and for one it does not; and its mark."""
    from tests.models import tiny_folder

    folder, marker = tiny_folder(tmp_path / "model"), tmp_path / "CODE_HAS_RUN"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    own = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(own | {"model_type": request.param, "auto_map": auto}))
    own = json.loads((folder / "tokenizer_config.json").read_text())
    auto_tokenizer = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    kind = {"tokenizer_class": "EvilTokenizer", "auto_map": auto_tokenizer, "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(own | kind))
    return folder, marker


def test_code_in_a_model_folder_does_not_run(evil_model: tuple[Path, Path]) -> None:
    import torch

    from grpo.trainer.model import load_policy

    folder, marker = evil_model
    config = Config.model_validate({"model": {"path": str(folder), "max_length": 256}, "rollout": {"max_tokens": 64}})
    attempts = (
        lambda: make_plan(config),
        lambda: load_tokenizer(config),
        lambda: load_policy(str(folder), None, torch.float32, 1.0, False),
    )
    for attempt in attempts:
        try:
            attempt()
        except (GrpoError, ValueError, KeyError) as error:  # an unknown type of model cannot be loaded without its code
            assert any(word in str(error) for word in ("custom code", "evil", "auto_map"))
        assert not marker.exists() and not (folder / "MARKER").exists()


def test_the_code_would_have_run(tmp_path: Path) -> None:
    """Else the test above would see nothing."""
    (tmp_path / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")).partition("from transformers")[0])
    subprocess.run([sys.executable, tmp_path / "evil.py"], check=True, timeout=60)
    assert (tmp_path / "ran").exists() and (tmp_path / "MARKER").exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def violations(source: str) -> list[str]:
    """Ways to run code that comes as data, and shells."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "sympy", "runpy", "code"}
        found += [f"imports {name}" for name in names if name.partition(".")[0] in banned]
        if isinstance(node, ast.Constant) and node.value in FORBIDDEN:
            found.append(f"names {node.value}")
    for name, call in calls(tree):
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"} or name.startswith(
            "os.exec"
        ):
            found.append(f"calls {name}")
        if name in {"torch.load", "np.load", "numpy.load", "pandas.read_pickle", "torch.hub.load"}:
            found.append(f"calls {name}")
        if name.startswith("yaml.") and name.endswith("load") and not safe_yaml(name, call):
            found.append(f"calls {name} without a safe loader")
        if name.startswith("subprocess.") and ("shell" in options or not isinstance(call.args[0], ast.List | ast.Name)):
            found.append(f"calls {name} with a text or a shell")
        trusted = options.get("trust_remote_code")
        # settings of generation are numbers alone
        if name.endswith("from_pretrained") and name != "GenerationConfig.from_pretrained" and not is_false(trusted):
            found.append(f"calls {name} without trust_remote_code=False")
        if trusted is not None and not is_false(trusted):
            found.append(f"calls {name} with trust_remote_code")
    return found


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def safe_yaml(name: str, call: ast.Call) -> bool:
    return name == "yaml.safe_load" or (
        len(call.args) == 2 and ast.unparse(call.args[1]) in ("Loader", "yaml.SafeLoader")
    )


ALLOWED = {
    # It drops these variables, for which it must name them.
    "rollout/environment.py": {f"names {name}" for name in FORBIDDEN},
    # The same interpreter once more, without what the shell asks of it.
    "__main__.py": {"calls os.execv"},
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_in_as_data(path: Path) -> None:
    assert set(violations(path.read_text())) <= ALLOWED.get(str(path.relative_to(ROOT / "grpo")), set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "os.system('x')",
        "torch.load(path)",
        "yaml.load(text)",
        "yaml.load(text, yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "subprocess.run('ls x')",
        "subprocess.Popen(f'ls {x}')",
        "subprocess.run(['ls'], shell=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AsyncEngineArgs(model=path, trust_remote_code=config.trust)",
        "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'; x = 'VLLM_ALLOW_INSECURE_SERIALIZATION'",
    ],
)
def test_the_rule_itself(source: str) -> None:
    assert violations(source)


def test_engines_start_without_the_variables_that_open_a_door(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORBIDDEN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # whatever else is set does not outlive the test
    prepare_environment(make_config(), "cpu")
    assert not set(FORBIDDEN) & set(os.environ)


# ---- the hub --------------------------------------------------------------------------------------------------------

COMMIT = "a" * 40
HERE: dict[str, Any] = {"model": {"path": "./model"}, "data": {"source": "rows.jsonl"}}


def load(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    tree = {name: HERE.get(name, {}) | sections.get(name, {}) for name in {**HERE, **sections}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"path": "owner/model"}}, "model"),
        ({"model": {"path": "gpt2"}}, "model"),
        ({"data": {"source": "owner/rows"}}, "data"),
        ({"data": {"source": "squad"}}, "data"),
        ({"eval": {"source": "owner/rows"}}, "eval"),
    ],
)
def test_a_hub_id_needs_a_commit(in_tmp: Path, sections: dict[str, dict[str, str]], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(in_tmp, **sections)
    assert f"set {key}.revision to its commit (40 hex digits" in str(caught.value)
    sections[key]["revision"] = COMMIT
    assert getattr(load(in_tmp, **sections), key).revision == COMMIT


@pytest.mark.parametrize(
    "revision", ["main", "v1.0", "refs/pr/1", "A" * 40, "a" * 39, "a" * 41, "a" * 40 + "\n", "", "g" * 40]
)
def test_a_branch_or_tag_is_no_commit(in_tmp: Path, revision: str) -> None:
    for section in ("model", "data", "eval"):
        with pytest.raises(ConfigError, match=rf"^{section}.revision = .*must be a commit: 40 hex digits"):
            load(in_tmp, **{section: {"revision": revision}})


@pytest.mark.parametrize("source", ["arithmetic", "rows.jsonl", "{split}.json", "./set", "/data/set", "a/b/c", "here"])
def test_what_is_on_this_machine_needs_no_commit(in_tmp: Path, source: str) -> None:
    (in_tmp / "here").mkdir()
    assert load(in_tmp, data={"source": source}, eval={"source": source}).data.revision is None
    if source in ("here", "./set", "/data/set", "a/b/c"):
        assert load(in_tmp, model={"path": source}).model.revision is None


def test_without_the_file_check_the_loaders_still_refuse(in_tmp: Path) -> None:
    """A Config may be made in code, too."""
    config = Config.model_validate({"model": {"path": "owner/model"}, "data": {"source": "owner/rows"}})
    for use in (load_tokenizer, make_plan):
        with pytest.raises(ConfigError, match="set model.revision"):
            use(config)


def test_the_examples_name_commits() -> None:
    config = load_config(ROOT / "examples" / "gsm8k.yaml")
    assert config.model.revision and config.data.revision


# ---- paths ----------------------------------------------------------------------------------------------------------

WRITTEN = ("run.dir", "checkpoint.dir")
READ = ("model.path", "data.source", "eval.source")
NOWHERE = [
    "",
    "a\0b",
    "a\nb",
    "a\rb",
    "\x1b[31m",
    "a\u202eb",
    "a\u200bb",
    "~",
    "~/runs",
    "~root/x",
    "x" * 300,
    "x/" * 600,
]
OUTSIDE = [
    "..",
    "../x",
    "runs/../../x",
    "/tmp/../etc",
    "runs/..",
    "file:///etc",
    "http://host/x",
    "gs://b/x",
    "a::b",
    "s3:/../x",
]
BUCKETS = [
    "s3://b",
    "s3://bucket/../other",
    "s3://bucket/a?x=1",
    "s3://Bucket/x",
    "s3:///x",
    "simplecache::s3://bucket/x",
]


@pytest.mark.parametrize("value", NOWHERE, ids=ascii)
@pytest.mark.parametrize("key", [*WRITTEN, *READ])
def test_a_path_that_cannot_be_meant_is_refused(in_tmp: Path, key: str, value: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError) as caught:
        load(in_tmp, **{section: {name: value}})
    message = str(caught.value)
    assert message.startswith(f"{key} = ") and "must" in message and message.isprintable()


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("key", WRITTEN)
def test_nothing_is_written_through_a_way_up_or_a_url(in_tmp: Path, key: str, value: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"^{key} = .*must"):
        load(in_tmp, **{section: {name: value}})


@pytest.mark.parametrize("value", BUCKETS)
def test_a_bucket_is_a_plain_bucket(in_tmp: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint.dir = "):
        load(in_tmp, checkpoint={"dir": value})
    assert load(in_tmp, checkpoint={"dir": "s3://my-bucket/runs/one"}).checkpoint.dir == "s3://my-bucket/runs/one"


@pytest.mark.parametrize("key", WRITTEN)
def test_a_folder_that_is_a_link_is_refused(in_tmp: Path, key: str) -> None:
    (in_tmp / "elsewhere").mkdir()
    (in_tmp / "runs").symlink_to("elsewhere")
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"{key} = runs: is a link to .*elsewhere; name the folder itself"):
        load(in_tmp, **{section: {name: "runs"}})
    (in_tmp / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="is a link to"):
        load(in_tmp, **{section: {name: "dangling"}})


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "checkpoints", "report.tmp"])
def test_a_link_in_the_folder_of_a_run_is_refused(in_tmp: Path, name: str) -> None:
    (in_tmp / "mine").mkdir()
    assert load(in_tmp, run={"dir": "mine"})
    (in_tmp / "mine" / name).symlink_to("/nowhere")
    with pytest.raises(ConfigError, match=rf"^run.dir: mine/{name} is a link, and the run may write there"):
        load(in_tmp, run={"dir": "mine"})


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "A", "a b", "a\n", "-a", "a" * 48, "", ".", "a;b", "$(x)", "a\0", "é", "{{7*7}}"]
)
def test_a_name_of_a_run_is_a_plain_label(in_tmp: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run.name = .*must be at most 47 of a-z"):
        load(in_tmp, run={"name": name})


def test_a_planted_link_does_not_lead_the_report_elsewhere(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=1)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.tmp", "report.html.tmp", "report.html"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(victim)
    write_report(run_dir)
    assert victim.read_text() == "precious"
    assert not (run_dir / "report.html").is_symlink()


# ---- text that steers -----------------------------------------------------------------------------------------------

STEERING = [
    HOSTILE,
    "\x1b]0;title\x07",
    "a\nb 1\n",
    'x"} 1\n# TYPE evil counter\nevil 1',
    "\\",
    '"',
    "{}",
    "\u202e\u2066",
    "%s%n",
    "\r",
]


def series(metrics: PrometheusMetrics) -> int:
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    assert all(family.name.startswith("grpo_") for family in families)
    return sum(len(family.samples) for family in families)


def recorded(model: str, text: str) -> PrometheusMetrics:
    metrics = PrometheusMetrics("run", "1.0", model, "dapo")
    metrics.record(make_stats(1))
    metrics.record_samples([make_group([0.0, 1.0], text=text)], 1)
    return metrics


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_metrics_keep_their_form_and_number(text: str) -> None:
    assert series(recorded(text, text)) == series(recorded("model", "text"))
    (info,) = [
        sample
        for family in text_string_to_metric_families(generate_latest(recorded(text, text).registry).decode())
        for sample in family.samples
        if sample.name == "grpo_run_info"
    ]
    assert info.labels["model"] == text


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_a_terminal_is_not_steered(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress(3, Console(force_terminal=False, width=200))
    progress.say(text)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and shown.rstrip("\n").isprintable()


def test_a_report_shows_hostile_text_as_text(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", steps=2, eval_every=1, text=HOSTILE)).read_text()
    body = page.partition("<body>")[2]
    assert "<script>alert(1)" not in body and "<img src=x" not in body and "&lt;script&gt;alert(1)" in body
    assert "{{ 7 * 7 }}" in body and ">49<" not in body
    assert "\x1b" not in body and "\u202e" not in body


def test_an_error_cannot_steer_the_terminal(tmp_path: Path) -> None:
    run_file = tmp_path / "\x1b[31mred\u202e.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "config", "show", str(run_file)], cwd=ROOT, capture_output=True, timeout=120
    )
    text = done.stderr.decode()
    assert done.returncode == 2 and text.startswith("error: ") and text.rstrip("\n").isprintable()


# ---- a real run: secrets, ports, tokens -----------------------------------------------------------------------------

CANARIES = {
    name: f"canary-{name.lower()}-{secrets.token_hex(8)}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN")
}


def leaks(folders: list[Path], texts: dict[str, str], canaries: dict[str, str]) -> list[str]:
    """Where a secret can be read: in a file below the folders, or in a text (output of a command, /metrics)."""
    secret = re.compile("|".join(map(re.escape, canaries.values())).encode())
    found = [name for name, text in texts.items() if secret.search(text.encode(errors="replace"))]
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        if secret.search(path.read_bytes()):
            found.append(str(path))
    return found


def listening(pids: set[int]) -> set[tuple[str, str, int]]:
    """Name, address and port of every TCP socket on which these processes listen."""
    found = set()
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
            found.add((psutil.Process(connection.pid).name(), connection.laddr.ip, connection.laddr.port))
    return found


def command_line(pid: int) -> str:
    """Empty for a process that is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def gcs_address(pids: set[int]) -> str | None:
    """Where the run's own Ray can be reached, from the command line of its raylet; None before there is one."""
    found = (re.search(r"^\S+/raylet .*--gcs-address=(\S+)", command_line(pid)) for pid in pids)
    return next((match[1] for match in found if match), None)


def token_of(pid: int) -> str | None:
    """The token by which a process of the run's own Ray is let in."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.environ().get("RAY_AUTH_TOKEN") if process.name() == "raylet" else None
    return None


def copy_logs(pids: set[int], target: Path) -> None:
    """The logs of the run's own Ray, from the folder that its raylet names."""
    found = re.search(r"--log_dir=(\S+)", " ".join(map(command_line, pids)))
    assert found
    shutil.copytree(found[1], target, symlinks=True)


JOIN = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
@ray.remote(num_cpus=0)
def mark(path): open(path, "w").close()
ray.get(mark.remote(sys.argv[2]), timeout=120)
"""


def join(address: str, marker: Path, token: str | None) -> subprocess.CompletedProcess[str]:
    """Another process that tries to run its own code in the cluster."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(marker.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # so it looks for nodes on loopback, where ours is
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", JOIN, address, str(marker)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:  # it waits for an answer that does not come: refused as well
        return subprocess.CompletedProcess(command, 124, "", "timeout")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A quickstart with secrets in its environment, looked at from outside, and stopped after its first step."""
    folder = tmp_path_factory.mktemp("security")
    run_dir, mark = folder / "run", secrets.token_hex(8)
    environment = os.environ | CANARIES | {MARK: mark, "TMPDIR": str(folder)}
    overrides = [f"run.dir={run_dir}", "run.steps=5000", "eval.prompts=8", "checkpoint.every=1", "metrics.port=0"]
    command = [sys.executable, "-m", "grpo", "train", "examples/quickstart.yaml", *overrides]
    output = (folder / "output").open("w+")
    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    seen: dict[str, Any] = {"run_dir": run_dir, "ray": folder / "ray", "sockets": set(), "metrics": ""}
    asked: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
    pool = ThreadPoolExecutor()
    try:
        deadline = time.monotonic() + 300
        while (
            not (run_dir / "metrics.jsonl").exists() or '"event": "step"' not in (run_dir / "metrics.jsonl").read_text()
        ):
            assert driver.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
            pids = marked(mark)
            seen["sockets"] |= listening(pids)
            if not asked and (address := gcs_address(pids)):  # a refusal takes its time, and so does the first step
                CANARIES["RAY_AUTH_TOKEN"] = next(filter(None, map(token_of, pids)))
                callers = {"none": None, "wrong": "f" * 64, "right": CANARIES["RAY_AUTH_TOKEN"]}
                asked = {who: pool.submit(join, address, folder / f"joined-{who}", callers[who]) for who in callers}
            time.sleep(0.3)
        for who, attempt in asked.items():
            seen[who] = (attempt.result(), (folder / f"joined-{who}").exists())
        pids = marked(mark)
        seen["processes"] = len(pids)
        seen["sockets"] |= listening(pids)
        port = re.search(r"localhost:(\d+)/metrics", (folder / "output").read_text())
        assert port
        seen["metrics"] = urllib.request.urlopen(f"http://localhost:{port[1]}/metrics", timeout=30).read().decode()
        seen["command lines"] = "\n".join(map(command_line, pids))
        copy_logs(pids, seen["ray"])  # they go with the run
        os.killpg(driver.pid, signal.SIGTERM)  # as `timeout` or a scheduler does
        seen["code"] = driver.wait(timeout=120)
    finally:
        driver.kill()
        pool.shutdown()
    seen["left"] = left_behind(mark, within=60)
    seen["output"] = (folder / "output").read_text()
    yield seen


@pytest.mark.slow
def test_no_secret_is_written_anywhere(run: dict[str, Any], tmp_path: Path) -> None:
    """Artefacts, checkpoints, the report, what is printed, /metrics, command lines, and the logs of Ray's session."""
    report = subprocess.run(
        [sys.executable, "-m", "grpo", "report", str(run["run_dir"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert report.returncode == 0, report.stderr
    texts = {name: run[name] for name in ("output", "metrics", "command lines")} | {"report": report.stdout}
    looked_at = [path for folder in (run["run_dir"], run["ray"]) for path in folder.rglob("*") if path.is_file()]
    assert len(looked_at) > 20 and any("raylet" in path.name for path in looked_at)
    assert leaks([run["run_dir"], run["ray"]], texts, CANARIES) == []


def test_the_search_finds_a_secret(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log").write_bytes(b"\x00\xff token=" + CANARIES["HF_TOKEN"].encode() + b"\xff")
    found = leaks([tmp_path], {"output": f"x{CANARIES['AWS_SESSION_TOKEN']}x", "metrics": ""}, CANARIES)
    assert found == ["output", str(tmp_path / "deep" / "log")]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["none", "wrong"])
def test_who_has_not_the_token_cannot_join(run: dict[str, Any], who: str) -> None:
    attempt, ran = run[who]
    assert attempt.returncode != 0 and not ran
    assert "canary" not in attempt.stderr and CANARIES["RAY_AUTH_TOKEN"] not in attempt.stderr


@pytest.mark.slow
def test_who_has_the_token_can(run: dict[str, Any]) -> None:
    """Else the two refusals above would prove nothing."""
    attempt, ran = run["right"]
    assert (attempt.returncode, ran) == (0, True), attempt.stderr[-2000:]


# Ports that other machines can reach, by process: /metrics, which Prometheus must reach; and a trainer rank's two
# rendezvous, of its group and of the weight transfer. Ray of this machine and an engine add none.
WIDE = {"python": 1, "ray::PolicyModelActor": 2}


@pytest.mark.slow
def test_only_known_sockets_are_open_to_other_machines(run: dict[str, Any]) -> None:
    """Printed for the record: which process listens where."""
    print("\n" + "\n".join(f"{name:40} {ip}:{port}" for name, ip, port in sorted(run["sockets"])))
    wide: dict[str, set[int]] = {}
    for name, ip, port in run["sockets"]:
        if ip in ("0.0.0.0", "::"):
            wide.setdefault(name.partition(".")[0], set()).add(port)
    assert "ray::PolicyModelActor" in wide and "raylet" in {name for name, _, _ in run["sockets"]}, "not looked at"
    assert {name: ports for name, ports in wide.items() if len(ports) > WIDE.get(name, 0)} == {}


@pytest.mark.slow
def test_no_process_stays_when_the_run_is_stopped(run: dict[str, Any]) -> None:
    """By SIGTERM to its group, after its first step; what is killed: test_end_to_end.py."""
    assert run["processes"] > 4, ROLES
    assert run["code"] == Interrupted.exit_code
    assert "Traceback" not in run["output"]
    assert run["left"] == set()
