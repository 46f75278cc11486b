"""Verbs that a pod runs: job, drain."""

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.arguments import Overrides, RunFile
from grpo.config.load import load_config
from grpo.errors import GrpoError

POD_FILE = Path("/etc/grpo/run.yaml")
"""Where the configuration of its run is in a pod."""
WORKER_SECONDS = 110.0
"""What `grpo drain` takes in a pod without one: the pods' grace period of two minutes, less what Ray needs to end."""


def job(
    run_file: RunFile,
    fetch: Annotated[Path | None, typer.Option(metavar="FETCH.yaml", help="Fetch what it names first.")] = None,
    preflight: Annotated[bool, typer.Option(help="Check the cluster first.")] = True,
    stop: Annotated[bool, typer.Option(help="Tell Ray that a job is stopped whose end would come again.")] = True,
) -> None:
    """What a RayJob runs: preflight and train, with their lines in the pod's log and in the run's folder too."""
    from grpo.run.pod import run_verbs

    try:
        run_dir = Path(load_config(run_file).run.dir)
    except GrpoError:  # the first verb says so
        run_dir = None
    steps = [("fetch", fetch)] if fetch else []
    steps += [(verb, run_file) for verb in ["preflight"] * preflight + ["train"]]
    code = run_verbs(steps, run_dir, _end_job if stop else None)
    raise typer.Exit(code)


def _end_job(message: str) -> None:
    from grpo.cluster.ray_private import end_job

    end_job(message)


def drain(
    run_file: Annotated[
        Path, typer.Argument(metavar="[RUN.yaml]", help="The configuration of the run, beside its driver.")
    ] = POD_FILE,
    overrides: Overrides = None,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Time that there is; run.grace_seconds if not given.")
    ] = None,
) -> None:
    """End in order what a run has on this machine or in this pod, because that is about to go away.

    Beside the driver: SIGTERM, and a wait for its commit and end. In a pod of workers: they move elsewhere first.
    """
    known = run_file != POD_FILE or run_file.exists()  # a pod of workers needs none
    config = load_config(run_file, overrides or []) if known else None
    from grpo.cluster.drain import drain as drain_here

    print(drain_here(config, seconds or (config.run.grace_seconds if config else WORKER_SECONDS)))
