"""The command line: parse, check, launch, exit code. What is heavy is imported inside its command, after parsing."""

import errno
import sys
from typing import Annotated

import typer

import grpo
from grpo.cli import folders, planning, pods, runs, settings
from grpo.cli.edge import Edge, failed
from grpo.cli.k8s import k8s_app
from grpo.errors import GrpoError
from grpo.run import screen, shell

app = typer.Typer(
    cls=Edge,
    name="grpo",
    help="GRPO fine-tuning of a language model: vLLM samples, DeepSpeed trains, Ray joins them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show what a configuration may hold or resolves to.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(k8s_app, name="k8s")


def _version(show: bool) -> None:
    if show:
        print(f"grpo {grpo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(runs.train)
app.command()(runs.sft)
app.command(name="eval")(runs.evaluate)
for _verb in (folders.report, folders.audit, folders.export, folders.fetch, planning.plan, planning.preflight):
    app.command()(_verb)
app.command(hidden=True)(pods.job)
app.command()(pods.drain)
config_app.command()(settings.schema)
config_app.command()(settings.show)


def main() -> None:
    """Runs the command line. A screen that goes away ends no run; other verbs are there for what they print."""
    out, _ = screen.install()
    shell.prepare()
    try:
        app()
    except SystemExit as end:
        sys.stdout.flush()
        if not end.code and out.lost and out.lost.errno != errno.EPIPE and sys.argv[1:2] not in (["train"], ["sft"]):
            lost = GrpoError(f"standard output: {out.lost.strerror}; what was printed is not whole")
            sys.exit(failed(lost).exit_code)
        raise
