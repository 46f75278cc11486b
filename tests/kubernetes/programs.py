"""Stand-ins for kubectl and helm on the PATH: they note down how they are called and answer as they are told."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """#!{python}
import json, pathlib, re, sys, time
folder = pathlib.Path({folder!r})
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
for number, (pattern, answers) in enumerate(json.loads((folder / "answers.json").read_text())):
    if re.search(pattern, " ".join(words)):
        count = folder / f"count-{{number}}"
        told = int(count.read_text()) if count.exists() else 0
        count.write_text(str(told + 1))
        answer = answers[min(told, len(answers) - 1)]
        if any("if" in one for one in answers):
            answer = [one for one in answers if "if" not in one or (folder / one["if"]).exists()][-1]
        if "patch" in words:
            (folder / "patched").touch()
        out = (folder / answer["file"]).read_bytes() if "file" in answer else answer.get("out", "").encode()
        sys.stdout.buffer.write(out)
        sys.stdout.flush()
        if "then" in answer:
            (folder / answer["then"]).touch()
        time.sleep(answer.get("seconds", 0))
        sys.stderr.write(answer.get("err", ""))
        sys.exit(answer.get("code", 0))
sys.exit(f"no answer to {{words}}")
"""
Answer = dict[str, Any]


class Programs:
    """kubectl and helm in a folder that is the whole PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._answers: list[tuple[str, list[Answer]]] = []
        for name in ("kubectl", "helm"):
            program = folder / name
            program.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        self._write()

    def answer(self, pattern: str, *answers: Answer) -> None:
        """The answers to commands in which the pattern is found, one after the other; the last one stays.

        With `if` in one of them: the last one whose event is there. An answer's `then` is an event, so is "patched".
        """
        self._answers = [one for one in self._answers if one[0] != pattern] + [(pattern, list(answers))]
        for count in self.folder.glob("count-*"):
            count.unlink()
        self._write()

    def items(self, pattern: str, *lists: Sequence[Answer], **events: Sequence[Answer]) -> None:
        """Lists of objects, as `kubectl get -o json` prints them; those of `events` once the event is there."""
        first = [{"out": json.dumps({"items": list(items)})} for items in lists]
        self.answer(
            pattern,
            *first,
            *({"out": json.dumps({"items": list(items)}), "if": event} for event, items in events.items()),
        )

    def calls(self, word: str = "") -> list[list[str]]:
        """Commands so far, those with this word in them."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words for words in map(json.loads, lines) if not word or word in words]

    def _write(self) -> None:
        scratch = self.folder / "answers.part"
        scratch.write_text(json.dumps(self._answers))
        os.replace(scratch, self.folder / "answers.json")


def job(release: str = "mine", run: str = "", **status: Any) -> Answer:
    """A RayJob of the chart."""
    labels = {
        "app.kubernetes.io/part-of": "grpo",
        "app.kubernetes.io/instance": release,
        "grpo.dev/run": run or f"{release}-grpo-1a",
    }
    metadata = {
        "name": f"{release}-grpo-9f",
        "uid": f"uid-{release}",
        "labels": labels,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    pod = {"template": {"spec": {"terminationGracePeriodSeconds": 7}}}
    spec = {
        "entrypoint": "grpo job /etc/grpo/run.yaml",
        "backoffLimit": 5,
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {"headGroupSpec": pod},
    }
    return {"metadata": metadata, "spec": spec, "status": status}


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
BAD = {
    "jobDeploymentStatus": "Complete",
    "jobStatus": "STOPPED",
    "message": "exit code 2: a retry would end alike\nerror: data.source",
}
SUSPENDED = {"jobDeploymentStatus": "Suspended", "jobStatus": ""}


def pod(role: str = "head", name: str = "", ready: bool = True, **more: Any) -> Answer:
    """A pod of the run."""
    container = {"name": "ray-head" if role == "head" else "ray-worker", "state": {"running": {}} if ready else {}}
    status: Answer = {"phase": "Running" if ready else "Pending", "containerStatuses": [container]}
    status["conditions"] = [{"type": "Ready", "status": str(ready)}]
    labels = {"app.kubernetes.io/component": role}
    metadata = {"name": name or f"pod-{role}", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": metadata, "spec": {"nodeName": "node-1"}, "status": {**status, **more}}
