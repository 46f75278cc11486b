"""`grpo train` and `grpo eval` after parsing: the data first, then Ray and its actors, then the loop."""

from collections.abc import Sequence
from pathlib import Path

from ray.actor import ActorHandle

from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.adapters import RayRollouts, RayTrainer, RayWeights
from grpo.cluster.session import Session, session
from grpo.config import Config
from grpo.controller import Controller, eval_sampling
from grpo.data import PromptStream, eval_prompts, load_tokenizer, train_prompts
from grpo.evaluation import score_evaluation
from grpo.recorder import RunRecorder
from grpo.rewards import RewardScorer
from grpo.types import Prompt, Stats


def train(config: Config) -> Path:
    """Runs the whole job and returns the run's folder.

    Raises: GrpoError; actors, engines and a local Ray are gone when it returns or raises.
    """
    with RunRecorder(config) as record, RewardScorer(config) as rewards:
        tokenizer = load_tokenizer(config)
        loaded = train_prompts(config, tokenizer)
        held_out = eval_prompts(config, tokenizer)
        record.say(f"data: {len(loaded.prompts)} prompts, {len(held_out.prompts)} held out, {loaded.skipped} rows skipped")
        stream = PromptStream(loaded.prompts, seed=config.run.seed)
        with session(config) as cluster:
            record.say(f"ray: started on {cluster.device}; starting {config.rollout.engines} engines, {config.train.ranks} ranks")
            engines, ranks = create_engines(cluster, config), create_ranks(cluster, config)
            start(cluster, config, engines, ranks)
            record.say("engines and ranks are ready")
            weights = RayWeights(cluster, config, ranks, engines, canary=loaded.prompts[0].token_ids)
            weights.connect()
            rollouts = RayRollouts(cluster, config, engines)
            trainer = RayTrainer(cluster, config, ranks, record.run_dir)
            Controller(config, stream, held_out.prompts, rollouts, rewards, trainer, weights, record).run()
    return record.run_dir


def evaluate(config: Config) -> Stats:
    """Scores the held-out prompts with `model.path` as it is; no trainer is started."""
    held_out: Sequence[Prompt] = eval_prompts(config, load_tokenizer(config)).prompts
    with RewardScorer(config) as rewards, session(config) as cluster:
        engines = create_engines(cluster, config)
        start(cluster, config, engines, ranks=[])
        rollouts = RayRollouts(cluster, config, engines)
        return score_evaluation(rewards.score(rollouts.generate(held_out, eval_sampling(config), step=0)))


def create_engines(cluster: Session, config: Config) -> list[ActorHandle]:
    gpus = config.rollout.gpus_per_engine or config.rollout.tensor_parallel
    return [
        cluster.create(VLLMActor, "rollout", gpus, config, index, cluster.device) for index in range(config.rollout.engines)
    ]


def create_ranks(cluster: Session, config: Config) -> list[ActorHandle]:
    gpus = config.train.gpus_per_rank or 1
    return [cluster.create(PolicyModelActor, "trainer", gpus, config, rank, cluster.device) for rank in range(config.train.ranks)]


def start(cluster: Session, config: Config, engines: Sequence[ActorHandle], ranks: Sequence[ActorHandle]) -> None:
    """All actors start side by side: most of the time is imports and model loading."""
    began = [engine.start.remote() for engine in engines]
    if ranks:
        host, port = cluster.get([ranks[0].address.remote()], config.deadlines.start, "start")[0]
        began += [rank.start.remote(host, port) for rank in ranks]
    for pids in cluster.get(began, config.deadlines.start, "start"):
        cluster.watch(pids)
