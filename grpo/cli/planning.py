"""Verbs that look ahead: plan, preflight."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grpo.cli.arguments import Overrides, RunFile, leave_shell
from grpo.config.load import load_config
from grpo.errors import ConfigError
from grpo.run.layout import CONFIG, METRICS, TIMELINE


def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Type of the GPUs: A100, L40S, H100, H200 ...")] = "H100",
    gpu_gib: Annotated[float | None, typer.Option(min=1.0, help="Memory of one GPU in GiB, if it has another.")] = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="GPUs to split; those of the run if not given.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(min=1.0, help="Mean length of prompts.")] = None,
    completion_tokens: Annotated[float | None, typer.Option(min=1.0, help="Mean length of completions.")] = None,
    from_run: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Folder of a run of this model whose rates count.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate memory by role, traffic, seconds a step and the best split of GPUs; no weights are loaded.

    Ends with exit code 2 if the run cannot fit the device that cluster.device names.
    """
    config = load_config(run_file, overrides or [])
    from grpo.observe.rows import read_rows
    from grpo.plan.forecast import Question, forecast, plain
    from grpo.plan.memory import cannot_fit
    from grpo.plan.table import speed_lines, tables

    rows = [list(read_rows(from_run / name)) for name in (METRICS, TIMELINE)] if from_run else []
    known = load_config(from_run / CONFIG, []) if from_run else None
    question = Question(gpu, gpu_gib, gpus, prompt_tokens, completion_tokens, str(from_run or ""))
    told = forecast(config, question, known, *rows)
    made = told.memory
    if as_json:
        print(json.dumps(plain(told), indent=2, allow_nan=False))
    else:
        console = Console()
        for table in tables(made, config):
            console.print(table)
        print("\n".join(speed_lines(told)))
    if cannot_fit(made):
        raise ConfigError("\n".join(made.warnings))
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr if as_json else sys.stdout)


def preflight(
    run_file: RunFile,
    overrides: Overrides = None,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Only model, rows, rewards and secrets, from here; no cluster is asked.")
    ] = False,
) -> None:
    """Check that the cluster, or this machine, has what the run needs; name what is missing.

    Exit code 2: something has to be changed. 10: it may come by itself, such as a node that is still starting.
    """
    config = load_config(run_file, overrides or [])
    leave_shell(config)
    from grpo import cluster
    from grpo.plan.preflight.verdict import conclude, lines

    began = time.monotonic()
    checks = cluster.preflight_inputs(config) if inputs else cluster.preflight(config)
    print("\n".join(lines(checks)))
    print(f"preflight: {len(checks)} checks in {time.monotonic() - began:.1f} s", flush=True)
    conclude(checks)
