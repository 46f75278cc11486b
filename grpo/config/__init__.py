"""Every knob of a run, and how it is read: closed, bounded, frozen. Needs pydantic alone."""

from grpo.config.algorithm import Algorithm
from grpo.config.data import Data, DataSource
from grpo.config.fields import MOST_ROWS
from grpo.config.lora import Lora
from grpo.config.rewards import Judge, RewardFunction, RewardHttp
from grpo.config.rollout import Rollout
from grpo.config.schema import (
    Checkpoint,
    Cluster,
    Config,
    Deadlines,
    Eval,
    Metrics,
    Model,
    RewardCode,
    Run,
    Sync,
)
from grpo.config.section import Section
from grpo.config.sft import Sft
from grpo.config.train import Train

__all__ = [
    "MOST_ROWS",
    "Algorithm",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "DataSource",
    "Deadlines",
    "Eval",
    "Metrics",
    "Judge",
    "Lora",
    "Model",
    "RewardCode",
    "RewardFunction",
    "RewardHttp",
    "Rollout",
    "Run",
    "Section",
    "Sft",
    "Sync",
    "Train",
]
