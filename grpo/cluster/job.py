"""`grpo train` and `grpo eval` after parsing: folder and data first, then Ray and its actors, then the loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from grpo.algorithm.intervals import Evaluation, full_passes, judged
from grpo.algorithm.schedule import rate_change
from grpo.checkpoint import Checkpoints, Commit
from grpo.cluster.actor_protocols import EngineActor, RankActor
from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.context import RecoveryBudget, RunContext
from grpo.cluster.fleet import Fleet, State
from grpo.cluster.handles import RayEngine, RayRank
from grpo.cluster.publishing import PublishedWeights
from grpo.cluster.rollouts import FleetRollouts
from grpo.cluster.session import Session, session
from grpo.cluster.syncing import WeightSync
from grpo.cluster.trainer_group import TrainerGroup
from grpo.cluster.turns import TurnTakingTrainer
from grpo.config import Config
from grpo.config.diff import check_config_diff, config_hash
from grpo.controller import Controller
from grpo.data.prompts import Loaded, eval_prompts, load_data, load_tokenizer, prompt_stream
from grpo.data.rendering import Rendering
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import BugError, GrpoError
from grpo.interfaces import Components, Engine, TrainerRank, Worker
from grpo.observe.progress import RunProgress
from grpo.observe.recorder import RunRecorder
from grpo.plan.placement import gpus_of
from grpo.rewards.built_in import answers_by_source, answers_of
from grpo.rewards.registry import RewardScorer
from grpo.rollout.ahead import AheadCollector
from grpo.rollout.collector import InlineCollector
from grpo.rollout.drawing import Drawer, eval_sampling
from grpo.run.advice import Where, typed
from grpo.run.failures import look
from grpo.run.fatal import check_fatal, write_fatal
from grpo.run.lease import Lease
from grpo.run.memory import return_freed_memory
from grpo.run.start import Phases
from grpo.run.stopping import StopRequest
from grpo.types import Group, Prompt, Sampling, Stats

W = TypeVar("W", bound=Worker)
PROMPTS_AT_ONCE = 512
END_SECONDS = 10.0
"""For what works ahead to end with the run; then the workers that it waits for are ended."""


def placed_engine(cluster: Session, config: Config, index: int, actor: type[EngineActor] = VLLMActor) -> Engine:
    """An engine in an actor, on a node for rollouts."""
    placed, needs = cluster.place(actor, "rollout", gpus_of(config, "rollout"), config, index, cluster.device)
    lane = cluster.shared.lane("rollout", index)
    return RayEngine(placed, index, needs, receivers=config.rollout.tensor_parallel, lane=lane)


def placed_rank(cluster: Session, config: Config, index: int, actor: type[RankActor] = PolicyModelActor) -> RayRank:
    """A trainer rank in an actor, on a node for trainers."""
    placed, needs = cluster.place(actor, "trainer", gpus_of(config, "trainer"), config, index, cluster.device)
    return RayRank(placed, index, needs)


ENGINES: dict[str, Callable[[Session, Config, int], Engine]] = {"vllm": placed_engine}
"""Who completes prompts and takes weights, by name; one that needs no place of ours does not ask the session."""


@dataclass(frozen=True)
class Makers:
    """What makes the workers of the two roles; the sweep of kills brings small ones."""

    engine: Callable[[Session, Config, int], Engine] = ENGINES["vllm"]
    rank: Callable[[Session, Config, int], RayRank] = placed_rank


def train(config: Config, makers: Makers = Makers(), began: float | None = None) -> Path:
    """Runs the job, from its newest checkpoint if it has one, and returns the run's folder.

    `began` is when the command did, in seconds of time.monotonic(), if this process is for this run alone.
    Raises: GrpoError; actors, engines and a local Ray are gone when it returns or raises.
    """
    return held(config, partial(_train, config, makers), began)


Work = Callable[[Path, StopRequest, Lease, Phases], None]
"""What a start does in its run's folder."""


def held(config: Config, work: Work, began: float | None) -> Path:
    """Does the work while the run's folder is this start's; what ends it for good is left in FATAL.json.

    Raises GrpoError, and what a library raises in this process as one.
    """
    return_freed_memory()
    phases = Phases("process", began)
    run_dir = Path(config.run.dir)
    with StopRequest(config.run.grace_seconds) as stop, Lease(run_dir, config.run.lease_seconds, stop) as lease:
        check_fatal(run_dir, config)
        try:
            work(run_dir, stop, lease, phases)
        except GrpoError as error:
            leave_fatal(run_dir, error, config, lease)
            raise
        except Exception as error:  # of a library, in the driver
            found = typed(look(error), Where(config, "driver", 0, "run"))
            leave_fatal(run_dir, found, config, lease)
            if isinstance(found, BugError):
                raise
            raise found from error
    return run_dir


def leave_fatal(run_dir: Path, error: GrpoError, config: Config, lease: Lease) -> None:
    """FATAL.json for an error that would come again. Raises Fenced: one that was overtaken stops nobody by it."""
    if error.fatal:
        lease.check()
        write_fatal(run_dir, error, config_hash(config))


def _train(config: Config, makers: Makers, run_dir: Path, stop: StopRequest, lease: Lease, phases: Phases) -> None:
    phases.begin("data")
    with RewardScorer(config, run_dir) as rewards:
        checkpoints = Checkpoints(config, run_dir, lease)
        newest = find_newest(config, checkpoints)
        rendering = Rendering(config, load_tokenizer(config), began(newest))
        loaded, held_out = load_data(config, rendering)
        rewards.check_answers([*loaded.prompts, *held_out.prompts])
        rewards.try_services(loaded.prompts[0])
        prompts = prompt_stream(config, loaded.prompts, rendering.now.isoformat() if rendering.sees_the_time else "")
        check_prompts(newest, prompts)
        if finished(config, newest):
            return
        attempt, streams = lease.attempt, prompts.contents()
        with RunRecorder(config, attempt=attempt, decode=rendering.decode, streams=streams, phases=phases) as record:
            tell(record, config, checkpoints, newest, loaded, held_out)
            if rewards.user_functions and config.reward_code.revision:
                record.say(f"reward code: {config.reward_code.revision}")
            if rewards.isolation:
                record.say(f"warning: reward code runs without these fences: {', '.join(rewards.isolation)}")
            roles = f"{config.rollout.engines_in_words} x vLLM and {config.train.ranks} x DeepSpeed"
            record.starting("ray")
            with session(config, stop, record.say) as cluster:
                record.starting("actors")
                record.say(f"starting {roles} on {cluster.device}")
                context = RunContext(config, cluster.workers, RecoveryBudget(config.run.max_recoveries), record)
                fleet = Fleet(context, partial(made, cluster, config, makers.engine), cluster.most_engines)
                trainer = trainer_of(context, partial(made, cluster, config, makers.rank), fleet)
                shared = (context, fleet, trainer, loaded.prompts[0].token_ids)
                ahead = config.rollout.max_staleness > 0
                weights = PublishedWeights(*shared, record) if ahead else WeightSync(*shared)
                fleet.gather(wait=True)
                trainer.ready()
                record.say("engines and ranks are ready")
                mixes = ahead and config.rollout.update == "in_flight"
                drawer = Drawer(config, prompts, FleetRollouts(context, fleet, weights.ensure, mixes), rewards)
                parts = (drawer, weights, record, stop, held_out.prompts)
                collector = AheadCollector(*parts, cluster.workers.background) if ahead else InlineCollector(*parts)
                components = Components(collector, trainer, weights, checkpoints, record, stop)
                try:
                    Controller(config, components).run(newest)
                finally:
                    collector.stop_ahead()
                    cluster.workers.background.join(END_SECONDS)


def trainer_of(context: RunContext, create: Callable[[int], TrainerRank], fleet: Fleet) -> TrainerGroup:
    """The ranks, which start: at once, or after engines with which they take turns."""
    if context.config.cluster.colocate:
        return TurnTakingTrainer(context, create, fleet)
    return TrainerGroup(context, create)


def finished(config: Config, newest: Commit | None) -> bool:
    """Whether the run has all its steps, and a word on it."""
    done = newest is not None and newest.step >= config.run.steps
    if done:
        say = RunProgress(config.run.steps).say
        say(f"the run has its {config.run.steps} steps; to train on raise run.steps and name it in run.allow_drift")
    return done


def tell(
    record: RunRecorder, config: Config, checkpoints: Checkpoints, newest: Commit | None, loaded: Loaded, held: Loaded
) -> None:
    """What is to be said of checkpoint, rate and rows before a run begins."""
    for name, reason in checkpoints.skipped:
        record.damaged(name, reason)
    if newest and (change := rate_change(newest.config, config, newest.step)):
        record.say(change)
    skipped = loaded.skipped + held.skipped
    record.say(f"data: {len(loaded.prompts)} prompts, {len(held.prompts)} held out, {skipped} rows skipped")
    for note in (*loaded.notes, *held.notes):
        record.say(note)


def made(cluster: Session, config: Config, make: Callable[[Session, Config, int], W], index: int) -> W:
    """A worker that the session knows."""
    worker = make(cluster, config, index)
    cluster.workers.add(worker)
    return worker


def find_newest(config: Config, checkpoints: Checkpoints) -> Commit | None:
    """The newest checkpoint. It looks before anything of the run's folder is touched.

    Raises ConfigError if the configuration is another than the checkpoint's.
    """
    commit = checkpoints.newest()
    if commit is not None:
        check_config_diff(commit.config, config)
    return commit


def began(newest: Commit | None) -> datetime | None:
    """The time that the prompts of the run have seen; None where none is recorded."""
    state = newest.state["progress"]["prompts"] if newest else {}
    return datetime.fromisoformat(state["began"]) if "began" in state else None


def check_prompts(newest: Commit | None, prompts: PromptStream | MixedStream) -> None:
    """Raises DataError if the prompts are others than those of the checkpoint."""
    if newest is not None:
        state = prompts.state()
        prompts.restore(newest.state["progress"]["prompts"])
        prompts.restore(state)


def evaluate(config: Config, full: bool = False) -> list[Evaluation]:
    """Scores the held-out prompts with `model.path` as it is; no trainer is started.

    `full`: all rows of the split, once greedily and once sampled, several times each.
    """
    passes = full_passes(config) if full else {"": eval_sampling(config)}
    with StopRequest(config.run.grace_seconds) as stop, RewardScorer(config) as rewards:
        loaded = eval_prompts(config, load_tokenizer(config), whole=full)
        held_out = loaded.prompts
        for note in loaded.notes:
            print(note)
        rewards.check_answers(held_out)
        rewards.try_services(held_out[0])
        with session(config, stop, roles=["rollout"]) as cluster:
            recoveries = RecoveryBudget(config.run.max_recoveries)
            context = RunContext(config, cluster.workers, recoveries, ConsoleObserver())
            fleet = Fleet(context, partial(made, cluster, config, Makers().engine), cluster.most_engines)
            rollouts = FleetRollouts(context, fleet, partial(serve_as_loaded, context, fleet))
            scored = {name: sampled(rollouts, rewards, held_out, sampling) for name, sampling in passes.items()}
    votes = answers_of(config.rewards), answers_by_source(config)
    return [judged(name, groups, *votes) for name, groups in scored.items()]


def sampled(
    rollouts: FleetRollouts, rewards: RewardScorer, prompts: Sequence[Prompt], sampling: Sampling
) -> list[Group]:
    """Scored groups of all prompts, some after the other, so that `deadlines.rollout` is not that of thousands."""
    groups: list[Group] = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[first : first + PROMPTS_AT_ONCE]
        groups += rewards.score(rollouts.generate(some, sampling, step=0, first=first))
    return groups


def serve_as_loaded(context: RunContext, fleet: Fleet) -> int:
    """Lets engines sample from the weights they were started with; waits until there is one."""
    fleet.gather(wait=not fleet.of(State.HEALTHY))
    calls = [slot.engine.commit_weights(0) for slot in fleet.of(State.STALE)]
    context.workers.get(calls, context.config.deadlines.sync, "start")
    fleet.verified()
    return 0


class ConsoleObserver:
    """An Observer without a run's folder or metrics: it prints what was replaced."""

    def recovered(self, role: str, _error: Exception, seconds: float) -> None:
        print(f"{role} replaced in {seconds:.1f} s")

    def starting(self, phase: str) -> None:
        pass

    def started(self, role: str, actors: Mapping[str, Stats]) -> None:
        pass

    def workers(self, role: str, ready: int, lost: int) -> None:
        pass

    def engines(self, wanted: int, healthy: int, joining: int) -> None:
        pass

    def engine(self, event: str, name: str) -> None:
        print(f"{name}: {event}")

    def policy_version(self, role: str, version: int, digest: str = "") -> None:
        pass

    def alive(self) -> None:
        pass
