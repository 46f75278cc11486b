"""The configuration of a supervised warm-up, out of that of the run which it prepares."""

import math
from fractions import Fraction

from grpo.config.algorithm import Algorithm
from grpo.config.rollout import Rollout
from grpo.config.schema import Config, Sync
from grpo.errors import ConfigError

FOLDER = "sft"
"""Below run.dir and checkpoint.dir, so that the warm-up and the run have folders of their own."""
LONGEST_NAME = 47


def supervised(config: Config) -> Config:
    """The same model, rows, trainer and machines; a run of its own, whose knobs are those of `sft`.

    Its policy is kept whole, for the run to begin with. What has no meaning for it is left at its default, so that it
    may change between two starts. Raises ConfigError.
    """
    run, train, sft, bucket = config.run, config.train, config.sft, config.checkpoint.dir
    if sft.rows_per_step < train.ranks:  # found here: a run without a warm-up may have any number of ranks
        raise ConfigError(
            f"each rank needs a row of each step: sft.rows_per_step = {sft.rows_per_step} is below train.ranks = "
            f"{train.ranks}; raise sft.rows_per_step"
        )
    name = f"{run.name[: LONGEST_NAME - len(FOLDER) - 1].rstrip('-')}-{FOLDER}"
    rate = {"learning_rate": sft.learning_rate, "schedule": sft.schedule, "warmup_steps": 0}
    sections = {
        "data": config.data.model_copy(update={"curriculum": None}),
        "run": run.model_copy(update={"name": name, "dir": f"{run.dir.rstrip('/')}/{FOLDER}"}),
        "rollout": Rollout(
            max_tokens=config.rollout.max_tokens, prompts_per_step=sft.rows_per_step, samples_per_prompt=2
        ),
        "algorithm": Algorithm(),
        "train": train.model_copy(update={**rate, "epochs": 1, "minibatches": 1}),
        "sync": Sync(),
        "eval": config.eval.model_copy(update={"every": sft.eval_every, "samples_per_prompt": 1, "temperature": 1.0}),
        "checkpoint": config.checkpoint.model_copy(
            update={"dir": bucket if bucket is None else f"{bucket.rstrip('/')}/{FOLDER}", "merged": True}
        ),
    }
    return config.model_copy(update=sections)


def with_steps(config: Config, rows: int) -> Config:
    """The configuration of `supervised` for that many rows: how many steps it makes, and how its rate rises."""
    sft = config.sft
    passes = Fraction(str(sft.epochs)) * rows  # as it is written: 0.1 of 30 rows are 3
    steps = sft.steps or max(1, math.ceil(passes / sft.rows_per_step))
    warmup = math.ceil(Fraction(str(sft.warmup_ratio)) * steps)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": steps}),
            "train": config.train.model_copy(update={"warmup_steps": warmup}),
        }
    )
