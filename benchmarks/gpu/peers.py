"""TRL's two trainers, each against vLLM's own server on the other half of the GPUs, as TRL's guide says."""

import json
import os
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.gpu.cases import Case
from benchmarks.gpu.devices import Watch, summary
from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.lengths import VARIABLE
from benchmarks.gpu.processes import Failed, Program, end_all
from benchmarks.gpu.record import Json, record
from benchmarks.gpu.setting import Setting

ASYNC = "trl-async"
TOKENS = 20_000
"""Of a micro-batch, about: what fits without recomputing activations, which is slower and TRL's default."""


def run_peer(
    case: Case,
    tokens: Sequence[str],
    setting: Setting,
    folder: Path,
    watch: Watch,
    until: float,
    keep: Callable[[Json], None],
) -> None:
    """Gives `keep` the record of each length. One server does for all, and is started anew after a failure.

    Raises Failed with all that has failed.
    """
    failures: list[str] = []
    server: Program | None = None
    port = 0
    for name in tokens:
        try:
            if server is None and not case.turns:
                port = free_port()
                server = start_server(tokens, setting, folder, port)
            began = time.time()
            result = train(case, name, setting, folder, server, port, until)
            keep(measured(case, name, result, setting, watch, began))
        except Failed as error:
            failures.append(f"{name}: {error}")
            end_all(spared=watch.pids)
            server = None
    if failures:
        raise Failed("; ".join(failures))


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def surroundings(setting: Setting, gpus: Sequence[int], **more: str) -> dict[str, str]:
    """The environment of a program that has those GPUs."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return kept | (here if setting.device == "cuda" else {"VLLM_HOST_IP": "127.0.0.1"}) | more


def start_server(tokens: Sequence[str], setting: Setting, folder: Path, port: int) -> Program:
    """vLLM's own, on the first half of the GPUs."""
    work, file = setting.work, write_rules(tokens, setting, folder / f"lengths-{port}.json")
    longest = work.longest_prompt + max(map(work.longest, tokens))
    command: list[str | Path] = [setting.python, "-m", "vllm.entrypoints.cli.main", "serve", setting.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(longest)]
    command += ["--dtype", "bfloat16", "--data-parallel-size", str(setting.half)]
    command += ["--weight-transfer-config", '{"backend": "nccl"}']
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    more = {VARIABLE: str(file), "VLLM_SERVER_DEV_MODE": "1"}
    return Program(command, folder / "server.log", surroundings(setting, range(setting.half), **more), folder)


def write_rules(tokens: Sequence[str], setting: Setting, file: Path) -> Path:
    """What `lengths.py` reads in those that sample."""
    work = setting.work
    rules = {str(work.longest(name)): [work.phase(name, 1)] for name in tokens}
    file.write_text(json.dumps({"samples": work.samples, "rules": rules}))
    return file


def train(
    case: Case, name: str, setting: Setting, folder: Path, server: Program | None, port: int, until: float
) -> Sequence[Json]:
    """What the trainer noted of each step."""
    more = {}
    if server:
        server.wait(lambda: answers(port), until)
    else:  # it samples itself
        more[VARIABLE] = str(write_rules([name], setting, folder / f"lengths-{name}.json"))
    file, result = folder / f"work-{name}.json", folder / f"steps-{name}.json"
    file.write_text(json.dumps(trainer_work(case, name, setting, result, port)))
    command: list[str | Path] = [setting.python, "-m", "benchmarks.gpu.trl_trainer", file]
    pool = setting.pool(case.turns)
    if pool > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={pool}"]
    gpus = range(setting.gpus - pool, setting.gpus)
    program = Program(command, folder / f"trainer-{name}.log", surroundings(setting, gpus, **more), ROOT)

    def made() -> bool:
        if server and server.process.poll() is not None:
            raise Failed("the server ended")
        return len(steps_of(result)) >= setting.warmup + setting.steps

    program.wait(made, until)
    program.end()  # the asynchronous one takes a quarter of a minute for it
    return steps_of(result)


def answers(port: int) -> bool:
    """Whether the server is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def trainer_work(case: Case, name: str, setting: Setting, result: Path, port: int) -> Json:
    """What trl_trainer.py reads."""
    work = setting.work
    pool = setting.pool(case.turns)
    rows = micro_batch(setting, name, pool, padded=not case.name.startswith(ASYNC))
    if work.rows % (rows * pool):
        raise Failed(f"{pool} GPUs cannot share {work.rows} rows evenly; give another number of --gpus or --prompts")
    return {
        "kind": case.name.partition("+")[0],
        "model": str(setting.model),
        "prompts": str(setting.prompts),
        "samples": work.samples,
        "max_tokens": work.longest(name),
        "longest": work.longest_prompt + work.longest(name),
        "steps": setting.warmup + setting.steps,
        "micro_batch": rows,
        "accumulation": work.rows // (rows * pool),
        "server": f"http://127.0.0.1:{port}",
        "group_port": free_port(),
        "settings": {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in case.settings)},
        "result": str(result),
    }


def micro_batch(setting: Setting, name: str, pool: int, padded: bool) -> int:
    """Rows on one of so many GPUs at once, a power of 2: with all padding, or with prompts that a group shares."""
    work = setting.work
    if padded:
        row = float(work.longest_prompt + work.longest(name))
    else:
        row = work.mean_prompt / work.samples + work.mean(name)
    rows = 1
    while 2 * rows * row <= TOKENS and 2 * rows * pool <= work.rows:
        rows *= 2
    return rows


def steps_of(file: Path) -> list[Json]:
    """The steps that the trainer has written down."""
    steps: list[Json] = json.loads(file.read_text())["steps"] if file.exists() else []
    return steps


def measured(case: Case, name: str, result: Sequence[Json], setting: Setting, watch: Watch, began: float) -> Json:
    """The record of the steps that count."""
    steps = result[setting.warmup : setting.warmup + setting.steps]
    window = (result[setting.warmup - 1]["time"] if setting.warmup else began, steps[-1]["time"])
    seconds = [step["seconds"] for step in steps]
    busy = [step["update"] + (step.get("scoring") or 0.0) + step["sync"] for step in steps]
    sampled = [step.get("generation") for step in steps]
    known = [value for value in sampled if value is not None]
    found = {
        "window": window,
        "steps": seconds,
        "completion_tokens": statistics.fmean(step["completion_tokens"] for step in steps),
        **{part: middle(steps, part) for part in ("update", "generation", "scoring", "sync")},
        "idle": {
            "engines": 1 - (sum(known) + sum(step["sync"] for step in steps)) / sum(seconds) if known else None,
            "trainer": 1 - sum(busy) / sum(seconds),
        },
        "details": {"every_step": list(result)},
    }
    about = {
        "case": case.name,
        "tokens": name,
        "start": result[0]["time"] - result[0]["seconds"] - began,
        "wanted_tokens": setting.work.rows * setting.work.mean(name),
        "gpus": summary(list(watch.looks), *window),
    }
    return {**about, **record(found, setting, case.turns)}


def middle(steps: Sequence[Mapping[str, float | None]], part: str) -> float | None:
    """The median of what the steps say of it; None if they do not."""
    values = [value for step in steps if (value := step.get(part)) is not None]
    return statistics.median(values) if values else None
