"""The guide's own blocks, run: rows, rewards and a model of one's own by values, a mistake in them, and the results."""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from grpo.data.arithmetic import rows
from tests.e2e.conftest import namespace
from tests.e2e.kube import CHART, Namespace, eventually, fails, run
from tests.e2e.runs import SMOKE, START_SECONDS, block, current, open_volume, options, show

pytestmark = pytest.mark.timeout(1200)
IMAGE = f"localhost/grpo-controller:{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}"
CLAIM = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}


@dataclass(frozen=True)
class Desk:
    """A namespace, and the folder in which somebody works on it."""

    space: Namespace
    folder: Path

    def helm(self, verb: str, *more: str) -> str:
        """Runs the guide's command, with another verb and more options."""
        return self.shell(self.command(verb, *more))

    def command(self, verb: str, *more: str) -> str:
        """The guide's command for this namespace."""
        command = block("sh", "helm install mine").replace("helm install", f"helm {verb}")
        command = command.replace("charts/grpo", str(CHART)).replace("-n grpo", f"-n {self.space.name}")
        command = command.replace("registry.example.com/team", "localhost")
        return f"{command.rstrip()} {shlex.join(more)}"

    def shell(self, command: str, does: Callable[..., str] = run) -> str:
        return does(["bash", "-euo", "pipefail", "-c", f"cd {shlex.quote(str(self.folder))}\n{command}"], seconds=200)

    def claim(self, name: str) -> None:
        """A claim that the user brings."""
        made = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": CLAIM}
        self.space.kubectl("apply", "-f", "-", stdin=json.dumps(made))
        open_volume(self.space, name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = namespace("grpo-own")
    one = Desk(next(made), tmp_path_factory.mktemp("desk"))
    for split, size in (("train", 512), ("test", 64)):
        plain = [{"question": row["question"], "answer": row["answer"].split("#### ")[1]} for row in rows(split, size)]  # type: ignore[arg-type]
        (one.folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (one.folder / "my-values.yaml").write_text(block("yaml", "my_rewards:score"))
    for name in ("models", "out"):
        one.claim(name)
    fill_models(one)
    yield one
    next(made, None)


def fill_models(desk: Desk) -> None:
    """Puts the small model of the images into the claim `models`, as folder `small`."""
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    copy = {
        "name": "copy",
        "image": IMAGE,
        "command": ["cp", "-r", "/opt/grpo/examples/quickstart/model", "/mnt/small"],
        "securityContext": restricted,
        "volumeMounts": [{"name": "models", "mountPath": "/mnt"}],
    }
    spec = {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [copy],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "copy"}, "spec": spec}
    desk.space.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    desk.space.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/copy", "--timeout=60s")


def test_a_check_in_one_pod_finds_a_mistake_before_anything_is_installed(desk: Desk) -> None:
    (desk.folder / "my_rewards.py").write_text("import torchh\n")
    assert "mine-grpo-check" in desk.shell(desk.command("install", "--set", "job.check=true"), fails)
    assert "No module named 'torchh'" in desk.space.kubectl("logs", "mine-grpo-check")
    assert desk.space.job() == {} and desk.space.objects("configmaps", "app.kubernetes.io/instance=mine") == []
    desk.space.helm("uninstall", "mine")
    desk.space.kubectl("delete", "pod", "mine-grpo-check")


def test_a_mistake_in_ones_own_code_costs_one_gang_and_is_told(desk: Desk) -> None:
    desk.helm("install", "--set", "job.ttlSecondsAfterFinished=5")
    open_volume(desk.space, "mine-grpo-runs")
    space = desk.space
    eventually(lambda: space.job_status() == "STOPPED", "a job that is stopped for good", START_SECONDS, space.describe)
    eventually(lambda: not space.pods(), "no pod left", 150, space.describe)
    status = space.job()["status"]
    assert status["jobDeploymentStatus"] == "Complete" and not status.get("failed"), status
    assert "torchh" in status["message"] and "a retry would end alike" in status["message"], status["message"]
    events = space.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}").split()
    assert events.count("CreatedRayCluster") == 1, events


OWN_MODEL = ("--set", "model.claim=models,model.path=small,config.model.path=null,results.claim=out,results.path=team")


def test_rows_rewards_and_a_model_of_ones_own_by_values(desk: Desk) -> None:
    (desk.folder / "my_rewards.py").write_text(block("python", "def score"))
    before = current(desk.space)
    desk.helm("upgrade", *OWN_MODEL, "--set", "job.check=true")
    one = current(desk.space)
    assert one.job != before.job and one.name != before.name
    one.at_step(2)
    said = one.space.kubectl("logs", one.space.ready("headgroup"), "-c", "ray-head")
    assert "data: 512 prompts, 64 held out" in said and "reward code: sha256:" in said
    one.succeeded()
    rewards = [row["reward/mean"] for row in one.rows()]
    show({"mean reward of one's own code at the first and last step": [rewards[0], rewards[-1]]})
    assert len(rewards) == 20 and rewards[-1] > rewards[0]
    head = one.space.ready("headgroup")
    kept = one.space.execute(head, "cat", f"{one.dir}/logs/attempt-1.log").strip()
    assert "The results: /mnt/results/team/" in kept and kept in one.space.kubectl("logs", head, "-c", "ray-head")


def test_the_notes_say_the_command_that_brings_the_results(desk: Desk) -> None:
    notes = desk.space.helm("get", "notes", "mine")
    (command,) = [line for line in notes.splitlines() if "mkdir OUT" in line]
    desk.shell(command)
    out = desk.folder / "OUT"
    made = json.loads((out / "manifest.json").read_text())
    assert made["run"] == current(desk.space).name
    assert {"report.html", "metrics.jsonl", "policy/model.safetensors", "policy/tokenizer.json"} <= {
        file["name"] for file in made["files"]
    }
    assert all((out / file["name"]).stat().st_size == file["size"] for file in made["files"])


def test_the_same_values_change_nothing_and_another_restart_goes_on_with_the_run(desk: Desk) -> None:
    before, uid = current(desk.space), desk.space.job()["metadata"]["uid"]
    desk.helm("upgrade", *OWN_MODEL)  # what is checked first is no change of the job
    assert desk.space.job()["metadata"]["uid"] == uid
    desk.helm("upgrade", *OWN_MODEL, "--set-string", "job.restart=2")
    after = eventually(lambda: current(desk.space), "the new job", 30)
    assert after.job != before.job and (after.name, after.dir) == (before.name, before.dir)
    after.succeeded()
    assert len(after.rows()) == 20  # it was done, and none was made again


def test_no_values_at_all_name_what_is_needed(desk: Desk) -> None:
    said = fails(["helm", "-n", desk.space.name, "install", "other", str(CHART)])
    assert "image.registry is empty" in said and "No model is named" in said and "cpu-smoke-values.yaml" in said


WRONG = {
    "secrets.huggingface.name=hub": "secrets.huggingface names the Secret hub, which is not in the namespace",
    "storage.storageClassName=fast": "storage.storageClassName is fast, but this cluster has",
    "storage.existingClaim=none": "storage.existingClaim names the PersistentVolumeClaim none",
    "model.claim=none,config.model.path=null": "model.claim names the PersistentVolumeClaim none",
    "code.configMap=none": "code.configMap names the ConfigMap none",
    "data.claim=none,config.data.source=null": "data.claim names the PersistentVolumeClaim none",
    "results.claim=none": "results.claim names the PersistentVolumeClaim none",
    "model.claim=models": "The model is named twice",
    "head.env[0].name=RAY_ADDRESS,head.env[0].value=x": "which belongs to KubeRay or to this chart",
    "rollout.replicas=4": "pods would hold their nodes and do nothing",
    "job.submissionMode=SidecarMode": "does not go with podSecurity restricted",
    "model.url=hf://owner/name@main,config.model.path=null": "a branch or tag of the hub can move",
}


@pytest.mark.parametrize("values", WRONG)
def test_wrong_values_are_a_sentence_and_install_nothing(values: str, desk: Desk) -> None:
    said = fails(["helm", "-n", desk.space.name, "install", "other", str(CHART), "-f", str(SMOKE), "--set", values])
    assert WRONG[values] in said
    assert "other" not in desk.space.helm("list", "-a", "-q").split()


def test_a_kept_claim_cannot_become_another(desk: Desk) -> None:
    command = ["helm", "-n", desk.space.name, "upgrade", "mine", str(CHART), "-f", str(SMOKE)]
    assert "a claim cannot shrink" in fails([*command, "--set", "storage.size=1Mi"])


@pytest.fixture
def baseline(tmp_path: Path) -> Iterator[Desk]:
    made = namespace("grpo-baseline", "baseline")
    yield Desk(next(made), tmp_path)
    next(made, None)


def test_a_volume_that_belongs_to_root_is_given_to_the_run_and_what_it_made_is_brought_from_there(
    baseline: Desk,
) -> None:
    """In SidecarMode, which Pod Security baseline admits; nobody opens the volume here."""
    space = baseline.space
    space.helm(
        *("install", "grpo", str(CHART), "-f", str(SMOKE), *options({"run.steps": 3})),
        *("--set", "podSecurity=baseline,storage.fixPermissions=true"),
    )
    one = current(space)
    assert space.job()["spec"]["submissionMode"] == "SidecarMode"
    one.succeeded()
    space.helm("test", "grpo", seconds=150)  # although its metrics are gone with it
    notes = space.helm("get", "notes", "grpo")
    (command,) = [line for line in notes.splitlines() if "mkdir OUT" in line]
    baseline.shell(command)
    found = {path.name for path in (baseline.folder / "OUT").rglob("*")}
    assert {"policy", "model.safetensors", "report.html", "metrics.jsonl"} <= found
