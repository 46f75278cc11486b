"""`grpo train` and `grpo eval` after parsing: folder and data first, then Ray and its actors, then the loop."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grpo.algorithm.evaluation import score_evaluation
from grpo.checkpoint import Checkpoints, Commit
from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.fleet import Fleet, RecoveryBudget, State
from grpo.cluster.groups import RayRollouts, RayTrainer
from grpo.cluster.session import Session, session
from grpo.cluster.syncing import RayWeights
from grpo.cluster.waiting import ActorHandle
from grpo.config import Config
from grpo.config.diff import check_config_diff, config_hash
from grpo.controller import Controller, eval_sampling
from grpo.data.prompts import PromptStream, eval_prompts, load_tokenizer, train_prompts
from grpo.errors import GrpoError
from grpo.interfaces import Components
from grpo.observe.progress import RunProgress
from grpo.observe.recorder import RunRecorder
from grpo.plan.placement import gpus_of
from grpo.rewards.registry import RewardScorer
from grpo.run.fatal import check_fatal, write_fatal
from grpo.run.lease import Lease
from grpo.run.stopping import StopRequest
from grpo.types import Stats


@dataclass(frozen=True)
class Actors:
    """The classes behind the two roles; the sweep of kills brings small ones."""

    rollout: type = VLLMActor
    trainer: type = PolicyModelActor


def train(config: Config, actors: Actors = Actors()) -> Path:
    """Runs the job, from its newest checkpoint if it has one, and returns the run's folder.

    Raises: GrpoError; actors, engines and a local Ray are gone when it returns or raises.
    """
    run_dir = Path(config.run.dir)
    with StopRequest(config.run.grace_seconds) as stop, Lease(run_dir, config.run.lease_seconds, stop) as lease:
        check_fatal(run_dir, config)
        try:
            _train(config, run_dir, actors, stop, lease)
        except GrpoError as error:
            if error.fatal:
                write_fatal(run_dir, error, config_hash(config))
            raise
    return run_dir


def _train(config: Config, run_dir: Path, actors: Actors, stop: StopRequest, lease: Lease) -> None:
    with RewardScorer(config) as rewards:
        tokenizer = load_tokenizer(config)
        loaded, held_out = train_prompts(config, tokenizer), eval_prompts(config, tokenizer)
        rewards.check_answers([*loaded.prompts, *held_out.prompts])
        prompts = PromptStream(loaded.prompts, seed=config.run.seed)
        checkpoints = Checkpoints(config, run_dir, lease)
        newest = find_newest(config, checkpoints, prompts)
        if newest and newest.step >= config.run.steps:
            say = RunProgress(config.run.steps).say
            say(f"the run has its {config.run.steps} steps; to train on raise run.steps and name it in run.allow_drift")
            return
        with RunRecorder(config, attempt=lease.attempt) as record:
            for name, reason in checkpoints.skipped:
                record.damaged(name, reason)
            skipped = loaded.skipped + held_out.skipped
            record.say(f"data: {len(loaded.prompts)} prompts, {len(held_out.prompts)} held out, {skipped} rows skipped")
            if rewards.isolation:
                record.say(f"warning: reward code runs without these fences: {', '.join(rewards.isolation)}")
            roles = f"{config.rollout.engines} x vLLM and {config.train.ranks} x DeepSpeed"
            with session(config, stop, record.say) as cluster:
                record.say(f"starting {roles} on {cluster.device}")
                recoveries = RecoveryBudget(config.run.max_recoveries)
                fleet = Fleet(cluster, config, partial(create_engine, cluster, config, actors), recoveries, record)
                trainer = RayTrainer(cluster, config, partial(create_rank, cluster, config, actors), recoveries, record)
                weights = RayWeights(cluster, config, fleet, trainer, self_test_prompt=loaded.prompts[0].token_ids)
                fleet.gather(wait=True)
                trainer.ready()
                record.say("engines and ranks are ready")
                rollouts = RayRollouts(cluster, config, fleet, weights.ensure)
                components = Components(prompts, rollouts, rewards, trainer, weights, checkpoints, record, stop)
                Controller(config, components, held_out.prompts).run(newest)


def find_newest(config: Config, checkpoints: Checkpoints, prompts: PromptStream) -> Commit | None:
    """The newest checkpoint. It looks before anything of the run's folder is touched.

    Raises ConfigError or DataError if the configuration or the prompts are others than the checkpoint's.
    """
    commit = checkpoints.newest()
    if commit is not None:
        check_config_diff(commit.config, config)
        state = prompts.state()
        prompts.restore(commit.state["progress"]["prompts"])
        prompts.restore(state)
    return commit


def evaluate(config: Config) -> Stats:
    """Scores the held-out prompts with `model.path` as it is; no trainer is started."""
    with StopRequest(config.run.grace_seconds) as stop, RewardScorer(config) as rewards:
        held_out = eval_prompts(config, load_tokenizer(config)).prompts
        rewards.check_answers(held_out)
        with session(config, stop) as cluster:
            recoveries = RecoveryBudget(config.run.max_recoveries)
            fleet = Fleet(
                cluster, config, partial(create_engine, cluster, config, Actors()), recoveries, ConsoleObserver()
            )
            rollouts = RayRollouts(cluster, config, fleet, partial(serve_as_loaded, cluster, config, fleet))
            return score_evaluation(rewards.score(rollouts.generate(held_out, eval_sampling(config), step=0)))


def serve_as_loaded(cluster: Session, config: Config, fleet: Fleet) -> int:
    """Lets engines sample from the weights they were started with; waits until there is one."""
    fleet.gather(wait=not fleet.of(State.HEALTHY))
    calls = [slot.handle.call("commit_weights", 0) for slot in fleet.of(State.STALE)]
    cluster.get(calls, config.deadlines.sync, "start")
    fleet.verified()
    return 0


class ConsoleObserver:
    """An Observer without a run's folder or metrics: it prints what was replaced."""

    def recovered(self, role: str, _error: Exception, seconds: float) -> None:
        print(f"{role} replaced in {seconds:.1f} s")

    def workers(self, role: str, ready: int, lost: int) -> None:
        pass

    def policy_version(self, role: str, version: int) -> None:
        pass

    def alive(self) -> None:
        pass


def create_engine(cluster: Session, config: Config, actors: Actors, index: int) -> ActorHandle:
    gpus = gpus_of(config, "rollout")
    return cluster.create(actors.rollout, "rollout", index, gpus, config, index, cluster.device)


def create_rank(cluster: Session, config: Config, actors: Actors, rank: int) -> ActorHandle:
    gpus = gpus_of(config, "trainer")
    return cluster.create(actors.trainer, "trainer", rank, gpus, config, rank, cluster.device)
