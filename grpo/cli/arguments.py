"""What several verbs take, and how they leave the shell behind."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from grpo.config import Config
from grpo.errors import Interrupted
from grpo.run import shell

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The configuration of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as train.learning_rate=2e-6."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run (run.dir).")]


def leave_shell(config: Config) -> None:
    """Before Ray is imported: a Ray on this machine hears nothing of the shell's. And signals are heard from now on."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup`
            signal.signal(number, _terminated)
    if config.cluster.address is None:
        shell.forget_ray(config.cluster.environment)


def _terminated(number: int, _frame: FrameType | None) -> None:
    """Ray installs its own handler later and `cluster` replaces it; this one covers the time before."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}")
