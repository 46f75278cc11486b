"""What `cluster.colocate` asks of other keys."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo.config.schema import Config


def why_not_colocated(config: "Config") -> str:
    """Why engines and ranks cannot take turns on the same GPUs, or ""."""
    rollout, train = config.rollout, config.train
    needed = {
        "rollout.max_staleness": (rollout.max_staleness, 0, "engines and ranks work one after the other"),
        "sync.every": (config.sync.every, 1, "an engine that has rested has no weights before the next sync"),
        "rollout.tensor_parallel": (rollout.tensor_parallel, 1, "a GPU has one rank and whole engines"),
        "rollout.gpus_per_engine": (rollout.gpus_per_engine, None, "each has the whole GPU in its turn"),
        "train.gpus_per_rank": (train.gpus_per_rank, None, "each has the whole GPU in its turn"),
    }
    for key, (value, right, why) in needed.items():
        if value != right:
            return f"with cluster.colocate {why}, but {key} is {value}; remove it, or cluster.colocate"
    engines = train.ranks * rollout.engines_per_gpu
    if (rollout.fewest_engines, rollout.most_engines) != (engines, engines):
        return (
            f"with cluster.colocate each rank shares its GPU with rollout.engines_per_gpu = {rollout.engines_per_gpu} "
            f"engines, but rollout.engines is {rollout.engines_in_words} and train.ranks {train.ranks}; write "
            f"rollout.engines: {engines}"
        )
    return ""
