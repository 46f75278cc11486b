"""What the loop drives and who does the work, as Protocols: `cluster` and `rollout` fulfil them, and tests by fakes."""

from grpo.interfaces.loop import (
    DRAWN,
    Batch,
    Checkpoints,
    Collector,
    Components,
    Observer,
    PromptStream,
    Recorder,
    Rewards,
    Rollouts,
    Trainer,
    Weights,
)
from grpo.interfaces.workers import (
    Call,
    Engine,
    Place,
    Sampler,
    TrainerRank,
    Transfer,
    WeightReceiver,
    Worker,
)

__all__ = [
    "DRAWN",
    "Batch",
    "Call",
    "Checkpoints",
    "Collector",
    "Components",
    "Engine",
    "Observer",
    "Place",
    "PromptStream",
    "Recorder",
    "Rewards",
    "Rollouts",
    "Sampler",
    "Trainer",
    "TrainerRank",
    "Transfer",
    "WeightReceiver",
    "Weights",
    "Worker",
]
