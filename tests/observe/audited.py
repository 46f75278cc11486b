"""Runs with books and checkpoints, written through the real recorder, and forgeries of them."""

import json
from pathlib import Path

from grpo.checkpoint import Checkpoints
from grpo.checkpoint.commit import MANIFEST, seal
from grpo.config import Config
from grpo.data.stream import PromptStream
from grpo.observe.chain import SEAL, Seal
from grpo.observe.recorder import RunRecorder
from grpo.store import record_of
from grpo.types import FileRecord, Group, Prompt, Sample
from tests.checkpoints import Held
from tests.runs import make_stats, quiet_progress

PROMPTS = [Prompt(f"abc:{row}", f"q{row}", "4", (1, row)) for row in (*range(1, 6), *range(8, 13))]


def config(steps: int = 6, **sections: dict[str, object]) -> Config:
    rollout = {"prompts_per_step": 4, "samples_per_prompt": 2, "max_tokens": 8} | sections.pop("rollout", {})
    run = {"steps": steps, "name": "fake"}
    ended = {"checkpoint": {"every": 2, "keep": 9}, "eval": {"every": 2}, "run": run, "rollout": rollout} | sections
    return Config.model_validate({"model": {"path": "x"}} | ended)


class Run:
    """A start of a run: steps when it is told, from the checkpoint `resumed` on."""

    def __init__(self, run_dir: Path, settings: Config, resumed: int = 0, attempt: int = 1) -> None:
        self.config, self.step, self.dropped = settings, resumed, 0
        self.stream = PromptStream(PROMPTS, settings.run.seed)
        self.checkpoints = Checkpoints(settings, run_dir, Held(attempt))
        contents = self.stream.contents()
        self.recorder = RunRecorder(settings, run_dir, quiet_progress(settings), ["grpo"], attempt, streams=contents)
        self.recorder.__enter__()
        commit = self.checkpoints.newest() if resumed else None
        self.recorder.rewind(
            resumed, {name: commit.read(name) for name in commit.state["attachments"]} if commit else {}
        )
        if commit:
            self.stream.restore(commit.state["progress"]["prompts"])
        self.sync(resumed)

    def sync(self, version: int) -> None:
        self.recorder.policy_version("rollout", version, f"digest {version}")

    def groups(self, count: int, version: int, equal: bool = False) -> list[Group]:
        return [self.group(prompt, version, equal) for prompt in self.stream.take(count)]

    def group(self, prompt: Prompt, version: int, equal: bool = False) -> Group:
        made = [
            Sample(
                prompt.id,
                at,
                prompt.token_ids,
                (7, at),
                (-0.5, -1.0),
                ((0, version),),
                "stop",
                "x",
                1.0 - at * (not equal),
            )
            for at in range(2)
        ]
        return Group(prompt, tuple(made))

    def train(
        self, version: int | None = None, groups: list[Group] | None = None, skipped: tuple[Group, ...] = ()
    ) -> None:
        self.step += 1
        version = self.step - 1 if version is None else version
        with self.recorder.step(self.step):
            groups = groups or self.groups(4, version)
            stats = make_stats(self.step) | ({"reward/dropped_groups": float(self.dropped)} if self.dropped else {})
            self.recorder.log_step(self.step, groups, stats, skipped)
        self.sync(self.step)

    def evaluate(self) -> None:
        with self.recorder.phase("eval"):
            held_out = [self.group(Prompt("held:1", "q", "4", (1,)), self.step)]
            self.recorder.log_eval(self.step, held_out, {"eval/accuracy": 0.5})

    def commit(self) -> None:
        self.checkpoints.begin(self.step)
        files = self.recorder.attachments(self.step)
        state = {"progress": {"step": self.step, "prompts": self.stream.state()}, "attachments": sorted(files)}
        self.checkpoints.commit(self.step, [], state, None, files)

    def to(self, last: int) -> "Run":
        while self.step < last:
            self.train()
            if self.step % 2 == 0:
                self.evaluate()
                self.commit()
        return self

    def end(self) -> None:
        self.recorder.__exit__(None, None, None)


def write_run(run_dir: Path, steps: int = 6, **sections: dict[str, object]) -> Path:
    run = Run(run_dir, config(steps, **sections))
    run.evaluate()
    run.to(steps).end()
    return run_dir


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "books.jsonl").read_text().splitlines()]


def write(run_dir: Path, changed: list[dict[str, object]], reseal: bool = True) -> None:
    """Books of these rows with a chain that holds; `reseal`: and checkpoints that say so."""
    end, at, lines = Seal(), {}, []
    for row in changed:
        line = end.written({key: value for key, value in row.items() if key != "chain"})
        lines.append(line)
        end = end.after(line)
        at[(row.get("event") in ("step", "eval") and row["step"]) or None] = end
    (run_dir / "books.jsonl").write_bytes(b"".join(lines))
    for folder in (run_dir / "checkpoints").glob("step_*") if reseal else ():
        sealed = at.get(int(folder.name[5:]))
        if sealed:
            edit(folder, SEAL, json.dumps({"rows": sealed.rows, "size": sealed.size, "chain": sealed.chain}).encode())


def edit(folder: Path, name: str, content: bytes) -> None:
    """Another file in a checkpoint, whose manifest says so too."""
    (folder / name).write_bytes(content)
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("digest")
    record = record_of(folder / name, name)
    body["files"] = [vars_of(record) if file["name"] == name else file for file in body["files"]]
    (folder / MANIFEST).write_bytes(seal(body))


def vars_of(record: FileRecord) -> dict[str, object]:
    return {"name": record.name, "size": record.size, "sha256": record.sha256}
