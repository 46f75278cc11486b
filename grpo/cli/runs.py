"""Verbs that make or judge a policy: train, sft, eval."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.cli.arguments import Overrides, RunFile, leave_shell
from grpo.config import Config
from grpo.config.load import load_config
from grpo.errors import CheckpointError, ConfigError
from grpo.run.start import process_began

if TYPE_CHECKING:
    from grpo.algorithm.intervals import Evaluation


def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Run the whole job, from the data to the report."""
    config = load_config(run_file, overrides or [])
    leave_shell(config)
    from grpo import cluster
    from grpo.checkpoint.results import deliver
    from grpo.observe.report import write_report

    run_dir = cluster.train(config, began=process_began())
    page = write_report(run_dir)
    results = deliver(config, run_dir)
    print(
        f"""
The report: {page}{f"{os.linesep}The results: {results}" if results else ""}
What to try next:
  the trained model as a folder   grpo export {run_dir} OUT
  its score on all held-out rows  grpo eval {run_file} --of {run_dir} --full
  the same with another seed      grpo train {run_file} run.dir={run_dir}-2 run.seed={config.run.seed + 1}"""
    )


def sft(run_file: RunFile, overrides: Overrides = None) -> None:
    """Warm the model up on the rows' own completions, before GRPO; the section `sft` says how.

    In the folder `sft` of run.dir; its `policy` is a model that `grpo train` begins with: model.path=RUN/sft/policy.
    """
    config = load_config(run_file, overrides or [])
    leave_shell(config)
    from grpo import cluster
    from grpo.observe.report import write_report

    policy = cluster.warm_up(config, began=process_began())
    page = write_report(policy.parent)
    revision = " model.revision=null" if config.model.revision else ""
    print(
        f"""
The report: {page}
What to try next:
  GRPO from what was learned      grpo train {run_file} model.path={policy}{revision}
  its score on all held-out rows  grpo eval {run_file} --of {policy} --full"""
    )


def evaluate(
    run_file: RunFile,
    overrides: Overrides = None,
    of: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_OR_MODEL", help="Whose policy: a run's newest, or a model's folder; else model.path."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All held-out rows, once greedily and once sampled, 8 times each.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write the scores with their intervals there.")
    ] = None,
) -> None:
    """Score the held-out prompts with the model as it is; scores of prompts have 95 % intervals.

    `--of runs/x` scores the newest policy of a run, `--of runs/x/sft` that of its warm-up.
    """
    if out is not None:
        check_out(out)
    if of is not None:
        from grpo.checkpoint.export import policy_of

        overrides = [*(overrides or []), f"model.path={policy_of(of)}", "model.revision=null"]
    config = load_config(run_file, overrides or [])
    if config.eval.prompts == 0:
        raise ConfigError("eval.prompts = 0: an evaluation needs held-out prompts; add eval.prompts=128")
    leave_shell(config)
    from grpo import cluster

    found = cluster.evaluate(config, full)
    table = Table("score", "value", "95 %", title=Text(f"{config.model.path}"))  # Text: no markup is read
    for one in found:
        name = " ".join(filter(None, [one.name, f"{one.prompts} prompts x {one.samples}"]))
        table.add_section()
        table.add_row(Text(name), "", "")
        for score, value in one.scores.items():
            low_high = one.intervals.get(score)
            table.add_row(score, f"{value:.4g}", f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else "")
    Console().print(table)
    if out is not None:
        write_scores(out, config, found)


def check_out(out: Path) -> None:
    """Raises ConfigError where the scores cannot be written; before they are found, which takes long. It is tried."""
    if os.path.isdir(out):
        raise ConfigError(f"--out {out}: must be a file for the scores, but is a folder; give another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch_of(out).write_text("")
        scratch_of(out).unlink()
    except OSError as error:
        raise ConfigError(
            f"--out {out}: the scores must be written there, but: {error.strerror}; give another file"
        ) from error


def scratch_of(out: Path) -> Path:
    """What is written first, and renamed."""
    return out.with_name(f"{out.name}.tmp")


def write_scores(out: Path, config: Config, found: "Sequence[Evaluation]") -> None:
    """Commits them as JSON, with what they are of. Raises CheckpointError where that cannot be."""
    from grpo.store.files import replace

    body = {"model": config.model.path, "seed": config.run.seed, "scores": [one._asdict() for one in found]}
    try:
        scratch_of(out).write_text(json.dumps(body, indent=1) + "\n")
        replace(scratch_of(out), out)
    except OSError as error:
        raise CheckpointError(f"--out: the scores must be written to {out}, but: {error}; give another file") from error
