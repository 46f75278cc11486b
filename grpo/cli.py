"""The command line: parse, check, launch, exit code. What is heavy is imported inside its command, after parsing."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import grpo
from grpo.config import Config
from grpo.config.load import config_schema, dump_config, load_config
from grpo.config.text import clean
from grpo.errors import CheckpointError, ConfigError, GrpoError, Interrupted
from grpo.run import screen, shell
from grpo.run.layout import CONFIG, METRICS, TIMELINE
from grpo.run.start import process_began

if TYPE_CHECKING:
    from grpo.algorithm.intervals import Evaluation


class _Edge(TyperGroup):
    """The process edge: a GrpoError is one block on stderr and its exit code; all else is our bug, with a traceback."""

    def invoke(self, ctx: Any) -> object:  # typer keeps the class of its contexts to itself
        try:
            if os.stat(".").st_nlink == 0:
                raise ConfigError("the working folder must be there, but it is gone; cd to another")
            return super().invoke(ctx)
        except GrpoError as error:
            raise _failed(error) from None
        except KeyboardInterrupt:
            raise _failed(Interrupted("stopped by Ctrl-C")) from None


def _failed(error: GrpoError) -> typer.Exit:
    lines = [clean(line) for line in str(error).splitlines()] or [type(error).__name__]
    print(
        "\n".join(f"error: {lines[0]}" if n == 0 else f"       {line}" for n, line in enumerate(lines)), file=sys.stderr
    )
    return typer.Exit(error.exit_code)


app = typer.Typer(
    cls=_Edge,
    name="grpo",
    help="GRPO fine-tuning of a language model: vLLM samples, DeepSpeed trains, Ray joins them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show what a configuration may hold or resolves to.", no_args_is_help=True)
app.add_typer(config_app, name="config")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The configuration of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as train.learning_rate=2e-6."),
]
POD_FILE = Path("/etc/grpo/run.yaml")
"""Where the configuration of its run is in a pod."""
WORKER_SECONDS = 110.0
"""What `grpo drain` takes in a pod without one: the pods' grace period of two minutes, less what Ray needs to end."""
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run (run.dir).")]


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


@app.command()
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Run the whole job, from the data to the report."""
    config = load_config(run_file, overrides or [])
    _leave_shell(config)
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


@app.command()
def sft(run_file: RunFile, overrides: Overrides = None) -> None:
    """Warm the model up on the rows' own completions, before GRPO; the section `sft` says how.

    In the folder `sft` of run.dir; its `policy` is a model that `grpo train` begins with: model.path=RUN/sft/policy.
    """
    config = load_config(run_file, overrides or [])
    _leave_shell(config)
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


@app.command(name="eval")
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
    _leave_shell(config)
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
    """Raises ConfigError where the scores cannot be written; before they are found, which takes long."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder must be there, but: {error}; give another file") from error
    if out.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        found = "a folder" if out.is_dir() else f"in {out.parent}, where nothing can be written"
        raise ConfigError(f"--out {out}: must be a file for the scores, but is {found}; give another file")


def write_scores(out: Path, config: Config, found: "Sequence[Evaluation]") -> None:
    """Commits them as JSON, with what they are of. Raises CheckpointError where that cannot be."""
    from grpo.store.files import replace

    body = {"model": config.model.path, "seed": config.run.seed, "scores": [one._asdict() for one in found]}
    try:
        scratch = out.with_name(f"{out.name}.tmp")
        scratch.write_text(json.dumps(body, indent=1) + "\n")
        replace(scratch, out)
    except OSError as error:
        raise CheckpointError(f"--out: the scores must be written to {out}, but: {error}; give another file") from error


@app.command()
def report(run: RunFolder) -> None:
    """Draw a run as one HTML page."""
    from grpo.observe.report import write_report

    print(write_report(run))


@app.command()
def audit(run: RunFolder) -> None:
    """Prove from a run's folder alone what it trained on, or name the first contradiction.

    Exit code 17: the folder contradicts itself. 18: it does not, but it does not hold all that a proof needs.
    """
    from grpo.observe.audit import audit as audit_run

    proof = audit_run(run)
    print(f"{run}: nothing contradicts")
    table = Table("proved", "")
    for name, count in vars(proof).items():
        if name != "notes":
            table.add_row(name, f"{count}")
    Console().print(table)
    for note in proof.notes:
        print(f"note: {note}")


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    step: Annotated[int | None, typer.Option(help="The step to take; the last saved one if not given.")] = None,
) -> None:
    """Copy a saved policy as a Hugging Face folder."""
    from grpo.checkpoint.export import export as export_policy

    export_policy(run, out, step)
    print(f"{out}: load it with transformers, vLLM or model.path={out}")


@app.command()
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


@app.command()
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


@app.command()
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
    _leave_shell(config)
    from grpo import cluster
    from grpo.plan.preflight.verdict import conclude, lines

    began = time.monotonic()
    checks = cluster.preflight_inputs(config) if inputs else cluster.preflight(config)
    print("\n".join(lines(checks)))
    print(f"preflight: {len(checks)} checks in {time.monotonic() - began:.1f} s", flush=True)
    conclude(checks)


@app.command(hidden=True)
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


@app.command()
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


@config_app.command()
def schema() -> None:
    """Print the JSON schema: every key and its meaning."""
    print(json.dumps(config_schema(), indent=2))


@config_app.command()
def show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print a configuration with every key filled in."""
    print(dump_config(load_config(run_file, overrides or [])), end="")


def _leave_shell(config: Config) -> None:
    """Before Ray is imported: a Ray on this machine hears nothing of the shell's. And signals are heard from now on."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup`
            signal.signal(number, _terminated)
    if config.cluster.address is None:
        shell.forget_ray(config.cluster.environment)


def _terminated(number: int, _frame: FrameType | None) -> None:
    """Ray installs its own handler later and `cluster` replaces it; this one covers the time before."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


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
            sys.exit(_failed(lost).exit_code)
        raise
