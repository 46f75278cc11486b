"""How long a step takes, from rates of the two pools: the model of docs/pipeline.md in numbers.

With n engines and m ranks: sampling G = tokens / (n x tokens a second), training T = FLOPs / (m x FLOP/s) and what
ranks tell each other, S what a sync keeps engines from.
    max_staleness 0           G + T + S
    1, between batches        max(G + S, T + R): a version that is published must still arrive (R) for the next batch
    2 and more, or in flight  max(G + S, T + 3/4 R): training is slower while a version travels, but not on one node
The longest completion adds to G where a batch is sampled whole. Rewards count as nothing.
"""

import math
from dataclasses import dataclass, replace

from grpo.config import Config
from grpo.plan.gpus import (
    BESIDE,
    COMPILED_SHARE,
    CPU_ADAM,
    DECODE_SHARE,
    ENGINE_TOKENS,
    FIXED_SYNC,
    FLOOR,
    HOST_LINK,
    LINK_SHARE,
    NEAR_RECEIVE_RATE,
    NEAR_SYNC_RATE,
    RECEIVE_RATE,
    SHARED_TOKENS,
    SYNC_RATE,
    TRAIN_SHARE,
    Gpu,
)
from grpo.plan.model_size import Shape
from grpo.plan.offload import offload_seconds
from grpo.plan.placement import grouped

PROMPT_TOKENS = 128
MACHINE = 8  # GPUs of one
MOST_SEQUENCES = 1024  # that decode together, as in rollout/build.py
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step. Mean tokens of a prompt and of a completion; `longest` completion."""

    prompts: int
    samples: int
    prompt_tokens: float
    completion_tokens: float
    longest: float

    @property
    def drawn(self) -> float:
        """Tokens that engines sample."""
        return self.prompts * self.samples * self.completion_tokens

    @property
    def forwarded(self) -> float:
        """Tokens that go through the trainer's model once: completions of one prompt share it."""
        return self.prompts * (self.prompt_tokens + self.samples * self.completion_tokens)


@dataclass(frozen=True, slots=True)
class Rates:
    """What one engine, one rank and one sync do. `sync`: seconds from trained weights to engines that have them, with
    nothing beside; `switch`: that engines stand still for a version; `receive`: on its way beside sampling."""

    engine_tokens: float
    rank_flops: float
    sync: float
    switch: float
    receive: float
    floor: float
    link: float
    slowed: float = BESIDE
    """By how much of `receive` beside it training is longer."""
    adam: float = math.inf
    """Numbers a second of a CPU that updates what was offloaded; infinite where `rank_flops` has been measured with
    it."""
    host_link: float = math.inf
    """Bytes a second between host and GPU, likewise."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step and of its parts, and the share of it in which each pool has nothing to do."""

    engines: int
    tensor_parallel: int
    ranks: int
    seconds: float
    sampling: float
    training: float
    sync: float
    rollout_idle: float
    trainer_idle: float


def work_of(config: Config, prompt_tokens: float | None = None, completion_tokens: float | None = None) -> Work:
    """A step's work. What is not known of lengths: prompts of PROMPT_TOKENS, and completions as long as they may be."""
    rollout = config.rollout
    room = config.model.max_length - rollout.max_tokens
    mean = min(completion_tokens or rollout.max_tokens, rollout.max_tokens)
    prompt = min(prompt_tokens or PROMPT_TOKENS, room)
    return Work(rollout.prompts_per_step, rollout.samples_per_prompt, prompt, mean, rollout.max_tokens)


def rates_of(config: Config, shape: Shape, gpu: Gpu, work: Work, engines: int, tensor_parallel: int) -> Rates:
    """Rates on GPUs of a type: the shares of `gpus.py` of what they can do."""
    size, peak = SIZES[config.model.dtype], gpu.bf16 if config.model.dtype == "bfloat16" else gpu.fp32
    weights = shape.parameters * size
    rows = max(1.0, min(MOST_SEQUENCES, work.prompts * work.samples / engines))
    context = work.prompt_tokens + work.completion_tokens / 2
    width = shape.heads * shape.head_dim
    read = (weights + rows * context * 2 * shape.layers * shape.kv_width * size) / gpu.bandwidth
    computed = rows * (2 * shape.parameters + 4 * shape.layers * width * context) / peak
    several = config.rollout.engines_per_gpu
    decode = DECODE_SHARE * rows / max(read, computed) * tensor_parallel / several
    carried = weights * several  # to one engine of a GPU after the other
    sync_rate, receive_rate = (NEAR_SYNC_RATE, NEAR_RECEIVE_RATE) if near(config) else (SYNC_RATE, RECEIVE_RATE)
    visible = FIXED_SYNC + carried / min(sync_rate, LINK_SHARE * gpu.link)
    compiled = config.train.compile is True or (config.train.compile == "auto" and config.train.zero_stage < 3)
    return Rates(
        engine_tokens=min(ENGINE_TOKENS, SHARED_TOKENS / several if several > 1 else ENGINE_TOKENS, decode),
        rank_flops=(COMPILED_SHARE if compiled else TRAIN_SHARE) * peak,
        sync=visible,
        switch=visible,
        receive=FIXED_SYNC + carried / min(receive_rate, LINK_SHARE * gpu.link),
        floor=FLOOR,
        link=LINK_SHARE * gpu.link,
        slowed=slowed_by_syncs(config),
        adam=CPU_ADAM,
        host_link=HOST_LINK,
    )


def train_flops(config: Config, shape: Shape, work: Work) -> float:
    """FLOPs of a step's updates on forwarded tokens: 2 N a pass and token forward, twice that backward."""
    train, algorithm = config.train, config.algorithm
    length = work.prompt_tokens + work.completion_tokens
    pass_ = 2 * shape.parameters + 2 * shape.layers * shape.heads * shape.head_dim * length
    passes = train.epochs * (4 if train.gradient_checkpointing else 3)
    correction = algorithm.correction or config.default_correction
    passes += algorithm.kl_coef > 0
    passes += correction != "none" and train.epochs * train.minibatches > 1
    return work.forwarded * pass_ * passes


def talk_seconds(config: Config, shape: Shape, work: Work, rates: Rates, ranks: int) -> float:
    """What ranks tell each other in a step: gradients once an update; at ZeRO stage 3 also weights, twice a pass."""
    train = config.train
    if ranks == 1:
        return 0.0
    away = (ranks - 1) / ranks
    moved = 2 * away * 4 * shape.parameters * train.epochs * train.minibatches
    if train.zero_stage == 3:
        moved += 2 * away * SIZES[config.model.dtype] * shape.parameters * micro_batches(config, work, ranks)
    return moved / rates.link


def micro_batches(config: Config, work: Work, ranks: int) -> int:
    """Passes of one rank in a step."""
    budget = config.fixed_tokens * ranks
    return int(max(config.train.minibatches, -(-work.forwarded // budget)) * config.train.epochs)


def step_of(
    config: Config, shape: Shape, work: Work, rates: Rates, engines: int, tensor_parallel: int, ranks: int
) -> Step:
    """The model. A pool is busy while it samples or trains, and in a sync."""
    drawing = work.drawn / (engines * rates.engine_tokens)
    tail = max(0.0, work.longest - work.completion_tokens) * rates.floor
    training = train_flops(config, shape, work) / (ranks * rates.rank_flops)
    training += talk_seconds(config, shape, work, rates, ranks)
    size, passes = SIZES[config.model.dtype], micro_batches(config, work, ranks)
    training += offload_seconds(config, shape.parameters, size, passes, ranks, rates.adam, rates.host_link)
    step = compose(config, drawing, tail, training, rates)
    return replace(step, engines=engines, tensor_parallel=tensor_parallel, ranks=ranks)


def near(config: Config) -> bool:
    """Whether weights go through the trainer's memory: on one machine, which no address of a cluster means."""
    fits = sum(group.gpus for group in grouped(config, "cuda")) <= MACHINE
    return config.sync.transport == "ipc" or (
        config.sync.transport == "auto" and fits and (config.cluster.address is None or config.roles_share_gpus)
    )


def slowed_by_syncs(config: Config) -> float:
    """Share of the time in which weights travel by which training beside it is longer."""
    return 0.0 if near(config) else BESIDE


def trains_beside(config: Config) -> bool:
    """Whether the next batch is trained while a version travels; else nothing is, or the version is waited for."""
    rollout = config.rollout
    return rollout.max_staleness > 1 or (rollout.max_staleness == 1 and rollout.update == "in_flight")


def compose(config: Config, drawing: float, tail: float, training: float, rates: Rates) -> Step:
    """A step of both pools from what each needs by itself; `tail` is the wait for the longest completion."""
    ahead, in_flight = config.rollout.max_staleness, config.rollout.update == "in_flight"
    every = config.sync.every
    sampling = drawing if ahead and in_flight else drawing + tail
    visible = (rates.switch if ahead else rates.sync) / every
    if not ahead:
        seconds, trainer = sampling + training + visible, training + visible
    else:
        trainer, receive = training, rates.receive / every
        if trains_beside(config):
            trainer += rates.slowed * receive
        seconds = max(sampling + visible, trainer if trains_beside(config) else training + receive)
    idle = (1 - (sampling + visible) / seconds, 1 - trainer / seconds)
    return Step(0, 0, 0, seconds, sampling, training, visible, max(0.0, idle[0]), max(0.0, idle[1]))
