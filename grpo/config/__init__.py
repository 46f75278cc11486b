"""Every knob of a run, and how it is read: closed, bounded, frozen. Needs pydantic alone."""

from grpo.config.algorithm import Algorithm
from grpo.config.data import Data, DataSource
from grpo.config.lora import Lora
from grpo.config.rewards import Judge, RewardFunction, RewardHttp
from grpo.config.schema import (
    MOST_ROWS,
    Checkpoint,
    Cluster,
    Config,
    Deadlines,
    Eval,
    Metrics,
    Model,
    RewardCode,
    Rollout,
    Run,
    Sync,
    Train,
)
from grpo.config.section import Section
from grpo.config.sft import Sft

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
