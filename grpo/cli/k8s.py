"""Verbs for a person at a terminal whose run is on Kubernetes: values, status, logs, fetch, stop."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo.cli.arguments import Overrides, RunFile
from grpo.config.load import load_config
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from grpo.kubernetes.release import Release

k8s_app = typer.Typer(
    help="A run on Kubernetes, by way of kubectl and helm: no port is forwarded.", no_args_is_help=True
)
Named = Annotated[
    str | None,
    typer.Argument(metavar="[RELEASE]", help="The release, its run or its RUN.yaml; the only one if not given."),
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAMESPACE", help="kubectl's own if not given.")
]
Context = Annotated[
    str | None, typer.Option(metavar="CONTEXT", help="Of kubectl's configuration; its own if not given.")
]


def _found(name: str | None, namespace: str | None, context: str | None) -> "Release":
    from grpo.kubernetes.release import find, release_named
    from grpo.kubernetes.tools import Cluster

    return find(Cluster(namespace, context), release_named(name))


def _say(line: str) -> None:
    print(line, flush=True)


def _read(line: str) -> None:
    """The same for a reader; without one (`| head`) there is nothing to follow."""
    _say(line)
    if getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None):
        raise typer.Exit


@k8s_app.command()
def values(
    run_file: RunFile,
    overrides: Overrides = None,
    registry: Annotated[
        str | None, typer.Option(metavar="REGISTRY", help="Where the images of `make images` are.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Type of the GPUs: A100, L40S, H100, H200 ...")] = "H100",
    gpu_gib: Annotated[float | None, typer.Option(min=1.0, help="Memory of one GPU in GiB, if it has another.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, which a pod cannot exceed.")] = 8,
) -> None:
    """Print the chart's values for a run: its configuration, pods with the sizes of `grpo plan`, and what it reads.

    `grpo k8s values RUN.yaml --registry REGISTRY > values.yaml`, then the command in its first lines.
    """
    config = load_config(run_file, overrides or [])
    from grpo.kubernetes.values import values_file
    from grpo.plan.forecast import Question, check_numbers
    from grpo.plan.gpus import gpu_named
    from grpo.plan.memory import cannot_fit, make_plan

    check_numbers(Question(gpu, gpu_gib))
    made = make_plan(config, gpu_gib or gpu_named(gpu).memory_gib)
    if cannot_fit(made):
        raise ConfigError("\n".join(made.warnings))
    text, asked = values_file(config, made, gpu, registry, gpus_per_node)
    print(text, end="")
    if not sys.stdout.isatty():  # a file, which nobody reads at once
        print("\n".join(f"needed beforehand: {line}" for line in asked), file=sys.stderr)
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)


@k8s_app.command()
def status(release: Named = None, namespace: Namespace = None, context: Context = None) -> None:
    """Show how a run is: its state and attempts, each pod and what it waits for, the newest step."""
    from grpo.kubernetes.status import status_lines

    for line in status_lines(_found(release, namespace, context)):
        _say(line)


@k8s_app.command()
def logs(
    release: Named = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the run is over, over lost connections and new attempts.")
    ] = False,
    wait: Annotated[float, typer.Option(min=1.0, help="With -f: longest time in seconds without a head.")] = 600.0,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print what the driver says: preflight, then a line for each step.

    With -f the exit code is 0 once the run has SUCCEEDED, 10 if it failed.
    """
    from grpo.kubernetes.logs import follow as follow_log
    from grpo.kubernetes.logs import show

    found = _found(release, namespace, context)
    if follow:
        follow_log(found, _read, wait)
    else:
        show(found, _say)


@k8s_app.command()
def fetch(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    release: Named = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Longest time.")] = 3600.0,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Bring report, metrics and model of a run that has succeeded, also when its pods are gone."""
    from grpo.kubernetes.results import fetch as fetch_results

    fetch_results(_found(release, namespace, context), out, _say, seconds)


@k8s_app.command()
def stop(
    release: Named = None,
    seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Longest wait; if not given, by the pods' grace period.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """End a run in order: the last finished step is committed, then its pods go. It can go on later."""
    from grpo.kubernetes.stop import stop as stop_run

    stop_run(_found(release, namespace, context), _say, seconds)
