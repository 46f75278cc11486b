"""`grpo sft` after parsing: a run of the trainer alone, on the rows' own completions, whose result is a model."""

import shutil
from functools import partial
from pathlib import Path

from grpo.checkpoint import Checkpoints
from grpo.checkpoint.export import export
from grpo.cluster.actors import SupervisedModelActor
from grpo.cluster.context import RecoveryBudget, RunContext
from grpo.cluster.handles import RayRank
from grpo.cluster.job import began as first_start
from grpo.cluster.job import check_prompts, finished, held, made, placed_rank, tell
from grpo.cluster.session import Session, session
from grpo.cluster.trainer_group import TrainerGroup
from grpo.config import Config
from grpo.config.diff import check_config_diff
from grpo.config.supervised import supervised, with_steps
from grpo.config.text import short
from grpo.controller import Controller
from grpo.data.completions import Completions
from grpo.data.prompts import load_data, load_tokenizer, prompt_stream
from grpo.data.rendering import Rendering
from grpo.errors import CheckpointError
from grpo.interfaces import Components
from grpo.observe.recorder import RunRecorder
from grpo.rollout.supervised import SupervisedCollector
from grpo.run.lease import Lease
from grpo.run.start import Phases
from grpo.run.stopping import StopRequest
from grpo.types import Prompt

POLICY = "policy"
"""Of the run's folder: the model that was learned."""
SHOWN = 400


def warm_up(config: Config, began: float | None = None) -> Path:
    """Runs the warm-up of a run, from its newest checkpoint if it has one, and returns the folder of its policy.

    `began` is when the command did, as in `train`.
    Raises: GrpoError; actors and a local Ray are gone when it returns or raises.
    """
    config = supervised(config)
    return held(config, partial(_warm_up, config), began) / POLICY


def _warm_up(config: Config, run_dir: Path, stop: StopRequest, lease: Lease, phases: Phases) -> None:
    phases.begin("data")
    checkpoints = Checkpoints(config, run_dir, lease)
    newest = checkpoints.newest()
    tokenizer = load_tokenizer(config)
    rendering = Rendering(config, tokenizer, first_start(newest))
    loaded, held_out = load_data(config, rendering, Completions(rendering, tokenizer))
    config = checkpoints.config = with_steps(config, len(loaded.prompts))
    if newest:
        check_config_diff(newest.config, config)
    prompts = prompt_stream(config, loaded.prompts, rendering.now.isoformat() if rendering.sees_the_time else "")
    check_prompts(newest, prompts)
    policy = run_dir / POLICY
    if not finished(config, newest):
        with RunRecorder(config, attempt=lease.attempt, engines=False, phases=phases) as record:
            tell(record, config, checkpoints, newest, loaded, held_out)
            first = loaded.prompts[0]
            record.say(
                f"behind a prompt of {len(first.token_ids)} tokens the first row teaches: {taught(rendering, first)}"
            )
            record.starting("ray")
            with session(config, stop, record.say, roles=["trainer"]) as cluster:
                record.say(f"starting {config.train.ranks} x DeepSpeed on {cluster.device}")
                record.starting("actors")
                context = RunContext(config, cluster.workers, RecoveryBudget(config.run.max_recoveries), record)
                trainer = TrainerGroup(context, partial(made, cluster, config, placed))
                trainer.ready()
                record.say("ranks are ready")
                collector = SupervisedCollector(prompts, config.sft.rows_per_step, trainer, held_out.prompts)
                Controller(config, Components(collector, trainer, None, checkpoints, record, stop)).run(newest)
        remove(policy)
    if not policy.exists():
        export(run_dir, policy)


def taught(rendering: Rendering, prompt: Prompt) -> str:
    """What a row teaches, as the model sees it."""
    return short(rendering.decode(prompt.completion_ids), most=SHOWN)


def remove(policy: Path) -> None:
    """Takes away the policy of a start before. Raises CheckpointError where that cannot be."""
    try:
        if policy.is_dir() and not policy.is_symlink():
            shutil.rmtree(policy)
        else:
            policy.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{policy}: must give way to the new policy, but: {error}; remove it") from error


def placed(cluster: Session, config: Config, index: int) -> RayRank:
    """A rank of a warm-up in an actor."""
    return placed_rank(cluster, config, index, SupervisedModelActor)
