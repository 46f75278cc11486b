"""Checkpoints: each whole, and each at the place of the books that it seals."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.checkpoint.commit import Commit, checkpoints_url, committed, load, order
from grpo.checkpoint.export import checkpoint_dir
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import CheckpointError
from grpo.interfaces import DRAWN
from grpo.observe.audit.lines import digests_in
from grpo.observe.audit.proof import refuted, shown
from grpo.observe.chain import SEAL, Seal, content_digest
from grpo.run.layout import METRICS
from grpo.store import open_store

WHOLE = "a checkpoint is whole"
AGREES = "a checkpoint agrees with the books"


@dataclass(frozen=True)
class Drawn:
    """A batch that a checkpoint holds: of each group prompt, digests of samples, and rewards."""

    prompts: list[str]
    samples: list[str]
    rewards: list[list[object]]


@dataclass
class Sealed:
    """What one checkpoint says."""

    name: str
    commit: Commit
    seal: Seal | None
    metrics: dict[int, list[str]] = field(default_factory=dict)
    """Digests of the lines of each step that it keeps."""
    drawn: dict[int, Drawn] = field(default_factory=dict)


def read_checkpoints(run_dir: Path) -> tuple[int, dict[int, Sealed]]:
    """How many are whole, and the newest of each step. Raises AuditError for one that is damaged."""
    store = open_store(checkpoints_url(checkpoint_dir(run_dir), run_dir))
    found: dict[int, Sealed] = {}
    names = committed(store)
    for name in names:
        try:
            found[order(name)[0]] = _sealed(name, load(store, name))
        except (CheckpointError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if name in committed(store):  # else a run that goes on has removed it
                raise refuted(
                    f"checkpoints/{name}", WHOLE, shown(str(error)), "nothing can be resumed from it"
                ) from error
    return len(names), found


def _sealed(name: str, commit: Commit) -> Sealed:
    listed = {file.name for file in commit.files}
    if SEAL not in listed:
        return Sealed(name, commit, None)
    seal = Seal.read(commit.read(SEAL))
    if seal is None:
        raise CheckpointError(f"{SEAL} seals nothing")
    sealed = Sealed(name, commit, seal)
    for step, digest in digests_in(commit.read(METRICS)) if METRICS in listed else ():
        sealed.metrics.setdefault(step, []).append(digest)
    for line in commit.read(DRAWN).splitlines()[1:] if DRAWN in listed else ():
        row = json.loads(line)
        groups = [(group["prompt"]["id"], group["samples"]) for group in row["groups"]]
        sealed.drawn[row["step"]] = Drawn(
            [name for name, _ in groups],
            ["".join(map(_digest, samples)) for _, samples in groups],
            [[sample["reward"] for sample in samples] for _, samples in groups],
        )
    return sealed


def _digest(sample: Mapping[str, Any]) -> str:
    return content_digest(sample["output_ids"], sample["logprobs"], sample["reward"])


def check_sealed(
    sealed: Sealed, end: Seal, step: int, stream: PromptStream | MixedStream, rules: Mapping[str, Any]
) -> None:
    """The checkpoint against the books up to the row that it seals."""
    where, progress = f"checkpoints/{sealed.name}", sealed.commit.state["progress"]
    if sealed.seal != end:
        found = f"books.jsonl:{end.rows} has another chain than {where}/{SEAL}"
        raise refuted("books.jsonl", "the books are as checkpoints have sealed them", found, "a row was changed")
    if not sealed.commit.step == progress["step"] == step:
        found = f"it says step {shown(progress['step'])} and the books are at {step} there"
        raise refuted(f"{where}/state.json", AGREES, found, "it is of another moment or run")
    taken, wanted = cursor(progress["prompts"]), cursor(stream.state())
    if taken != wanted:
        found = f"its prompts are {shown(taken)} and those of the books {shown(wanted)}"
        raise refuted(f"{where}/state.json", AGREES, found, "a resume from it would skip or repeat prompts")
    config, clock = sealed.commit.config, rules["clock"]
    rollout: Any = config["rollout"]
    names = ("prompts_per_step", "samples_per_prompt")
    said = [rollout.get("max_staleness", 0), config["sync"]["every"], *(rollout[name] for name in names)]  # type: ignore[index]
    booked = [clock["staleness"], clock["every"], *(rules[name] for name in names)]
    if said != booked:
        raise refuted(
            f"{where}/manifest.json", AGREES, f"its rules are {said} and the books' {booked}", "one is forged"
        )


def cursor(state: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Fingerprint, turns so far and those that were skipped, of each source."""
    sources = state.get("sources", {"": state})
    return [
        (of["fingerprint"], of["epoch"] * of["size"] + of["position"], of.get("skipped", 0))
        for _, of in sorted(sources.items())
    ]
