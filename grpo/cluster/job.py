"""`grpo train` and `grpo eval` after parsing: the data first, then Ray and its actors, then the loop."""

from collections.abc import Sequence
from pathlib import Path

from grpo.cluster.actors import PolicyModelActor, VLLMActor
from grpo.cluster.adapters import RayRollouts, RayTrainer, RayWeights
from grpo.cluster.session import Actor, Session, session
from grpo.config import Config
from grpo.controller import Controller, eval_sampling
from grpo.data import PromptStream, eval_prompts, load_tokenizer, train_prompts
from grpo.evaluation import score_evaluation
from grpo.recorder import RunRecorder
from grpo.rewards import RewardScorer
from grpo.types import Stats


def train(config: Config) -> Path:
    """Runs the whole job and returns the run's folder.

    Raises: GrpoError; actors, engines and a local Ray are gone when it returns or raises.
    """
    with RewardScorer(config) as rewards:
        tokenizer = load_tokenizer(config)
        loaded, held_out = train_prompts(config, tokenizer), eval_prompts(config, tokenizer)
        rewards.check_answers([*loaded.prompts, *held_out.prompts])
        with RunRecorder(config) as record, session(config) as cluster:
            skipped = loaded.skipped + held_out.skipped
            record.say(f"data: {len(loaded.prompts)} prompts, {len(held_out.prompts)} held out, {skipped} rows skipped")
            engines_ranks = f"{config.rollout.engines} x vLLM and {config.train.ranks} x DeepSpeed"
            record.say(f"starting {engines_ranks} on {cluster.device}")
            engines, ranks = create_engines(cluster, config), create_ranks(cluster, config)
            start(cluster, config, engines, ranks)
            weights = RayWeights(cluster, config, ranks, engines, canary=loaded.prompts[0].token_ids)
            weights.connect()
            record.say("engines and ranks are ready")
            Controller(
                config,
                prompts=PromptStream(loaded.prompts, seed=config.run.seed),
                eval_prompts=held_out.prompts,
                rollouts=RayRollouts(cluster, config, engines),
                rewards=rewards,
                trainer=RayTrainer(cluster, config, ranks, record.run_dir),
                weights=weights,
                recorder=record,
            ).run()
        return record.run_dir


def evaluate(config: Config) -> Stats:
    """Scores the held-out prompts with `model.path` as it is; no trainer is started."""
    with RewardScorer(config) as rewards:
        held_out = eval_prompts(config, load_tokenizer(config)).prompts
        rewards.check_answers(held_out)
        with session(config) as cluster:
            engines = create_engines(cluster, config)
            start(cluster, config, engines, ranks=[])
            cluster.get([engine.commit_weights.remote(0) for engine in engines], config.deadlines.start, "start")
            groups = RayRollouts(cluster, config, engines).generate(held_out, eval_sampling(config), step=0)
            return score_evaluation(rewards.score(groups))


def create_engines(cluster: Session, config: Config) -> list[Actor]:
    gpus = config.rollout.gpus_per_engine or config.rollout.tensor_parallel
    return [
        cluster.create(VLLMActor, "rollout", gpus, config, index, cluster.device)
        for index in range(config.rollout.engines)
    ]


def create_ranks(cluster: Session, config: Config) -> list[Actor]:
    gpus = config.train.gpus_per_rank or 1
    return [
        cluster.create(PolicyModelActor, "trainer", gpus, config, rank, cluster.device)
        for rank in range(config.train.ranks)
    ]


def start(cluster: Session, config: Config, engines: Sequence[Actor], ranks: Sequence[Actor]) -> None:
    """All actors start side by side: most of the time is imports and model loading."""
    began = [engine.start.remote() for engine in engines]
    if ranks:
        host, port = cluster.get([ranks[0].address.remote()], config.deadlines.start, "start")[0]
        began += [rank.start.remote(host, port) for rank in ranks]
    for pids in cluster.get(began, config.deadlines.start, "start"):
        cluster.watch(pids)
