"""Verbs about folders: of a run (report, audit, export), of what a run reads (fetch)."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from grpo.cli.arguments import RunFolder


def report(run: RunFolder) -> None:
    """Draw a run as one HTML page."""
    from grpo.observe.report import write_report

    print(write_report(run))


def audit(
    run: RunFolder,
    skipped: Annotated[
        bool, typer.Option("--skipped", help="Also name each prompt whose turns data.curriculum skipped.")
    ] = False,
) -> None:
    """Prove from a run's folder alone what it trained on, or name the first contradiction.

    Exit code 17: the folder contradicts itself. 18: it does not, but it does not hold all that a proof needs.
    """
    from grpo.observe.audit import audit as audit_run

    proof = audit_run(run)
    print(f"{run}: nothing contradicts")
    table = Table("proved", "")
    for name, count in vars(proof).items():
        if name not in ("notes", "turns"):
            table.add_row(name, f"{count}")
    Console().print(table)
    for note in proof.notes:
        print(f"note: {note}")
    for (prompt, difficulty), count in sorted(proof.turns.items()) if skipped else ():
        print(f"{prompt}: skipped {count} x, {difficulty}")


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="The step to take; the last saved one if not given.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter of train.lora alone, for PEFT.")] = False,
) -> None:
    """Copy a saved policy as a Hugging Face folder."""
    from grpo.checkpoint.commit import ADAPTER, POLICY
    from grpo.checkpoint.export import export as export_policy

    export_policy(run, out, step, ADAPTER if adapter else POLICY)
    if adapter:
        print(f"{out}: load it with PeftModel.from_pretrained(model, {str(out)!r}), onto the model of the run")
        return
    print(f"{out}: load it with transformers, vLLM or model.path={out}")


def fetch(
    source: Annotated[
        str,
        typer.Argument(metavar="URL", help="s3://bucket/prefix, hf://[datasets/]owner/name@commit, or a list (.yaml)."),
    ],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to make, with a URL.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only files that match this pattern, or one of these.")
    ] = None,
) -> None:
    """Bring a model or rows from a bucket or the hub into a folder: once, verified, whole or absent."""
    from grpo.store.fetch import fetch as fetch_one
    from grpo.store.fetch import items_of

    for item in items_of(source, out, include or []):
        fetch_one(item, say=lambda line: print(line, flush=True))
