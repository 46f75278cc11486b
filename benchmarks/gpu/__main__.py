"""The same GRPO steps by grpo and by TRL on the GPUs of this machine, one system after the other, each alone.

    python -m benchmarks.gpu --cases s0,s1,s2,trl,trl-async --tokens 200,512,tail

Half of the GPUs sample and half train, in every system; in our `+turns` cases each does both. Model (random weights),
prompts and the lengths of completions are the same for all: `work.py`, `lengths.py`. Results are written after each
case: result.json, result.md and, where matplotlib is, pictures. A case that fails is told with the end of its log, and
the others go on. `--device cpu --shape tiny` tries all of it with our cases on a CPU.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import devices, plots
from benchmarks.gpu.cases import Case, cases_named, groups_of, lengths_named
from benchmarks.gpu.environment import ROOT, make_environment, own_paths
from benchmarks.gpu.ours import run_ours
from benchmarks.gpu.peers import run_peer
from benchmarks.gpu.processes import Failed, Program, adopt, end_all, tail_of
from benchmarks.gpu.record import Json
from benchmarks.gpu.report import render
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.work import SHAPES, make_work, write_prompts
from grpo.plan.gpus import DEFAULT, GPUS, gpu_named

PREPARE_SECONDS = 300.0
STARTS = {"grpo": 140.0, "peer": 120.0}
"""Seconds until the first step, about: whether a case still fits."""
PER_TOKEN = {"grpo": 0.035, "peer": 0.06}
"""Seconds of a step for each token of a completion, about."""
FUSED = """import torch
from deepspeed.ops.adam import FusedAdam
p = torch.nn.Parameter(torch.ones(8, device="cuda")); p.grad = torch.ones_like(p); FusedAdam([p]).step()
print("FusedAdam is compiled")"""


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    ends = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt()
    watch = devices.Watch()
    try:
        setting = prepare(options)
        result: Json = {**about(options, setting), "records": [], "failures": []}
        save(result, setting.out)
        for _ in range(options.repeats):
            for case in options.cases:
                for tokens in groups_of(options.tokens, options.apart):
                    measure(case, tokens, setting, result, watch, ends, options)
        print(f"\n{render(result)}\nfiles: {setting.out}")
        return 1 if result["failures"] else 0
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        end_all(spared=watch.pids)
        watch.close()


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Ends the program for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=told(cases_named), default="s0,s1,s2,trl,trl-async", help="see cases.py")
    parser.add_argument("--tokens", type=told(lengths_named), default="200,512,tail", help="of completions")
    parser.add_argument("--warmup", type=at_least(0), default=2, help="steps that are not counted, for each length")
    parser.add_argument("--steps", type=at_least(1), default=4, help="steps that are")
    parser.add_argument("--repeats", type=at_least(1), default=1, help="times that all cases are gone through")
    parser.add_argument("--seconds", type=float, default=86400, help="no case starts that would not end within these")
    parser.add_argument("--case-seconds", type=float, default=600, help="the longest that a case may take")
    parser.add_argument("--apart", action="store_true", help="a run for each length of ours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all our cases")
    parser.add_argument("--engines-per-gpu", type=at_least(1), default=3, help="of our cases")
    parser.add_argument("--gpus", type=at_least(1), help="how many; all of this machine if not given")
    parser.add_argument("--gpu", help=f"type, for limits and predictions: {', '.join(GPUS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="1.5b", choices=list(SHAPES))
    parser.add_argument("--prompts", type=at_least(1), default=64)
    parser.add_argument("--samples", type=at_least(2), default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="results, in a folder of their own")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-gpu/work"), help="model and environment, kept")
    options = parser.parse_args(arguments)
    found = devices.names() if options.device == "cuda" else []
    halves = not all(case.turns for case in options.cases)
    options.gpus = options.gpus or max(1 + halves, len(found))
    if options.gpu and options.gpu not in GPUS:
        parser.error(f"--gpu must be one of {', '.join(GPUS)}, not {options.gpu!r}")
    options.gpu = options.gpu or next((key for key in GPUS if found and key in found[0]), DEFAULT)
    if options.gpus % 2 and halves:
        parser.error(
            f"half of the GPUs sample and half train, but --gpus = {options.gpus}; give an even number, or cases with "
            "+turns alone"
        )
    if options.device == "cuda" and len(found) < options.gpus:
        parser.error(f"--gpus = {options.gpus}, but nvidia-smi finds {len(found)}; try --device cpu --shape tiny")
    if options.device == "cpu" and not all(case.ours for case in options.cases):
        parser.error("on a CPU only our cases run: --cases s0,s1,s2")
    return options


def told(parse: Callable[[str], list[Any]]) -> Callable[[str], list[Any]]:
    """For argparse, which keeps what a ValueError says to itself."""

    def parsed(text: str) -> list[Any]:
        try:
            found = parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if not found:
            raise argparse.ArgumentTypeError("name one at least")
        return found

    return parsed


def at_least(least: int) -> Callable[[str], int]:
    """For argparse."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return parsed


def prepare(options: argparse.Namespace) -> Setting:
    """Environment, model, prompts; what compiles for every system alike is compiled before anything is measured."""
    out = options.out / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    options.work.mkdir(parents=True, exist_ok=True)
    python = make_environment(options.work.resolve() / "python", own_paths(sys.path))
    model = options.work.resolve() / f"model-{options.shape}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "benchmarks.gpu.work", model, options.shape, options.device]
    programs = [Program(command, out / "model.log", environment, ROOT)]
    if options.device == "cuda":
        programs.append(Program([python, "-c", FUSED], out / "fused_adam.log", environment, Path("/")))
    work = make_work(options.shape, options.prompts, options.samples)
    write_prompts(work, out / "prompts.jsonl")
    until = time.monotonic() + PREPARE_SECONDS
    for program in programs:
        try:
            program.wait_for_end(until)
        except Failed as error:
            raise Failed(f"{error}\n{tail_of(program.log)}") from error
    return Setting(
        work=work,
        shape_name=options.shape,
        gpu_name=options.gpu,
        gpu=gpu_named(options.gpu),
        gpus=options.gpus,
        device=options.device,
        python=python,
        model=model,
        prompts=(out / "prompts.jsonl").resolve(),
        out=out.resolve(),
        warmup=options.warmup,
        steps=options.steps,
        engines_per_gpu=options.engines_per_gpu,
        base=tuple(options.set),
    )


def about(options: argparse.Namespace, setting: Setting) -> Json:
    """What result.json says of the whole."""
    return {
        "gpu": options.gpu if options.device == "cuda" else "CPU",
        "gpus": options.gpus if options.device == "cuda" else 1,
        "device": options.device,
        "names": devices.names(),
        "cores": os.cpu_count(),
        "shape": f"{options.shape} ({setting.shape.parameters / 1e9:.3g} billion parameters)",
        "prompts": options.prompts,
        "samples": options.samples,
        "prompt_tokens": setting.work.mean_prompt,
        "warmup": options.warmup,
        "steps": options.steps,
        "tail": setting.work.tail,
        "set": options.set,
        "engines_per_gpu": options.engines_per_gpu,
    }


def measure(
    case: Case,
    tokens: list[str],
    setting: Setting,
    result: Json,
    watch: devices.Watch,
    ends: float,
    options: argparse.Namespace,
) -> None:
    """One case with these lengths, into `result`, which is then written."""
    name = f"{len(result['records']) + len(result['failures']):02d}-{case.name}-{'-'.join(tokens)}"
    folder = setting.out / re.sub(r"[^\w.+-]", "-", name)
    left, wanted = ends - time.monotonic(), expected(case, tokens, setting)
    failure = {"case": case.name, "tokens": tokens}
    if left < wanted:
        result["failures"].append({**failure, "why": f"not started: about {wanted:.0f} s, but {left:.0f} s are left"})
        save(result, setting.out)
        return
    folder.mkdir()

    def keep(record: Json) -> None:
        print(f"{time.strftime('%T')} {case.name}, {record['tokens']}: {record['seconds']:.2f} s a step", flush=True)
        result["records"].append(record)
        save(result, setting.out)

    print(f"{time.strftime('%T')} {case.name}, {', '.join(tokens)}: about {wanted:.0f} s", flush=True)
    run = run_ours if case.ours else run_peer
    try:
        run(case, tokens, setting, folder, watch, time.monotonic() + min(left, options.case_seconds), keep)
    except Exception as error:  # whatever it is, the other cases go on
        logs = "\n".join(f"{log.name}:\n{tail_of(log)}" for log in sorted(folder.glob("*.log")))
        why = str(error) if isinstance(error, Failed) else repr(error)
        result["failures"].append({**failure, "why": why, "log": logs})
        print(f"{time.strftime('%T')} {why}\n{logs}", flush=True)
    finally:
        end_all(spared=watch.pids)
        save(result, setting.out)
        draw(result, setting.out)
    watch.free()


def expected(case: Case, tokens: Sequence[str], setting: Setting) -> float:
    """Seconds that a case takes, about."""
    kind, scale = "grpo" if case.ours else "peer", 1.0 if setting.device == "cuda" else 0.2
    steps = setting.warmup + setting.steps + case.ahead
    return scale * (STARTS[kind] + sum(steps * setting.work.mean(name) * PER_TOKEN[kind] for name in tokens))


def save(result: Json, folder: Path) -> None:
    """result.json and result.md."""
    for name, text in (("result.json", json.dumps(result, indent=1)), ("result.md", render(result))):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.rename(folder / name)


def draw(result: Json, folder: Path) -> None:
    """Pictures, between two cases: they take a core for a while."""
    try:
        plots.draw(result, folder)
    except Exception as error:  # no reason to stop
        print(f"no pictures: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
