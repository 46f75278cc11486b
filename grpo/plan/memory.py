"""What a run will need, before anything is started: from the configuration and the model's config.json alone.

Sources: the states of mixed-precision AdamW and their sharding are from the ZeRO paper, arXiv 1910.02054, sections 3.1
and 5 (K = 12 bytes a parameter of fp32 copy and moments; our gradients are accumulated in fp32). Activations are an
estimate: what a Llama-like block keeps for its backward pass, 8h + 2kv + 4i numbers a token and layer. What a process
takes before it holds a model (PROCESS) was measured.
"""

import dataclasses
from dataclasses import dataclass

from grpo.config import Config
from grpo.plan.model_size import Shape, read_shape
from grpo.plan.offload import gpu_gradients, gpu_weights, host_bytes
from grpo.plan.placement import crowded, grouped

GIB = 2**30
FP32 = 4
HEAD_CHUNK = 1024  # completion positions whose logits the trainer holds at once, as in trainer/head.py
MASTER = 12  # bytes a parameter in a checkpoint beside the weights: fp32 weights and AdamW's two moments
SAVED_AT_ONCE = 2 * GIB  # of them, that a rank copies to the host while it saves, as in trainer/state.py
PROCESS = {"controller": 1.0 * GIB, "rollout": 1.5 * GIB, "trainer": 1.25 * GIB}  # with Ray's own in its pod
CUDA_HOST = 4 * GIB  # of a process that holds a GPU: its context, libraries and pinned buffers
TOKEN = 40  # bytes that a token of a step takes on its way: its id and logprob in samples, and once packed
OBJECT_STORE = GIB // 4  # the least for Ray's objects
QUEUE = 10 * 24 * 2**20  # shared memory of a queue between the processes of one vLLM engine
NCCL_SHM = GIB // 8  # of each GPU
ROOM, LOGITS, GRAIN, MOST_TOKENS = 0.9, 16, 1024, 65536  # of a micro-batch, as in trainer/token_budget.py
RESTING = 2 * GIB  # of a GPU that an engine keeps while it rests: its context and CUDA graphs; an estimate
SPARE = 2.0  # a GPU takes the copy of weights ahead if so many times its size is free, as in rollout/shadow.py


@dataclass(frozen=True, slots=True)
class Pod:
    """Sizes in bytes for one actor of a role: `memory` without /dev/shm, and /dev/shm with Ray's objects."""

    memory: int
    shm: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes. `weights` to `head`: one trainer rank, `host` of it in its pod's memory (`train.offload_*`);
    `kv_tokens_*` are tokens that an engine's cache holds."""

    parameters: int
    trained: int
    sync_bytes: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    host: int
    activations: int
    head: int
    engine_weights: int
    kv_per_token: int
    kv_tokens_cpu: int
    kv_tokens_gpu: int
    engine_gpu: int
    shadow: int
    shadow_on_gpu: bool
    rows: int
    tokens: int
    updates: int
    micro_batch: int
    gpu_gib: float
    checkpoint: int
    volume: int
    object_store: int
    pods: dict[str, Pod]
    device: str
    warnings: tuple[str, ...]

    @property
    def rank_bytes(self) -> int:
        """Bytes that one rank of the trainer needs at its peak; it has loaded the whole model before ZeRO cuts it."""
        return max(self.resident_bytes + self.activations + self.head, self.sync_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of them that it holds all the time."""
        return self.weights + self.reference + self.gradients + self.optimizer


def make_plan(config: Config, gpu_gib: float = 80.0) -> Plan:
    """The plan for `config` on GPUs of `gpu_gib` GiB. Raises ConfigError if the model's config.json is out of reach."""
    shape, rollout, train = read_shape(config), config.rollout, config.train
    size = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    weights = shape.parameters * size
    stage, ranks = train.zero_stage, train.ranks
    # Without ZeRO, fp32 weights are their own master copy.
    trained = shape.adapter_parameters(train.lora) if train.lora else shape.parameters
    adam = trained * (8 if size == FP32 and stage == 0 else 12)
    kv_per_token = 2 * shape.layers * shape.kv_width * size
    gpu_budget = int(gpu_gib * GIB * rollout.engine_memory) * rollout.tensor_parallel
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    tokens = rows * config.model.max_length
    checkpoint = kept_weights(config, weights, trained * size) + MASTER * trained
    base = weights + (trained * size if train.lora else 0)
    held = {
        "weights": gpu_weights(train, base, size),
        # That of an adapter is the model without it.
        "reference": weights if config.algorithm.kl_coef > 0 and not train.lora else 0,
        "gradients": gpu_gradients(train, trained, size),
        "optimizer": 0 if train.offload_optimizer == "cpu" else adam // (ranks if stage >= 1 else 1),
    }
    micro_batch = micro_batch_tokens(config, shape, size, sum(held.values()), gpu_gib)
    made = Plan(
        parameters=shape.parameters,
        trained=trained,
        sync_bytes=weights,
        **held,
        host=host_bytes(train, base, trained, size),
        activations=activation_bytes(shape, micro_batch, size, train.gradient_checkpointing),
        head=head_bytes(shape, micro_batch, *of_head(config, size)),
        engine_weights=weights // rollout.tensor_parallel,
        kv_per_token=kv_per_token,
        kv_tokens_cpu=int(rollout.kv_cache_gib * GIB) // kv_per_token,
        kv_tokens_gpu=max(0, gpu_budget - weights) // kv_per_token,
        engine_gpu=gpu_budget // rollout.tensor_parallel,
        shadow=weights if rollout.max_staleness else 0,
        shadow_on_gpu=False,
        rows=rows,
        tokens=tokens,
        updates=train.epochs * train.minibatches,
        micro_batch=micro_batch,
        gpu_gib=gpu_gib,
        checkpoint=checkpoint,
        volume=checkpoint * copies(config),
        object_store=max(OBJECT_STORE, 2 * TOKEN * tokens),
        pods={},
        device=config.cluster.device,
        warnings=(),
    )
    made = dataclasses.replace(made, shadow_on_gpu=shadow_on_gpu(made, config))
    made = dataclasses.replace(made, pods=pods(made, config))
    return dataclasses.replace(made, warnings=tuple(gpu_problems(made, config) + cpu_problems(made, config)))


def shadow_on_gpu(made: Plan, config: Config) -> bool:
    """Whether engines' GPUs have room for the versions that arrive beside sampling; else they lie in host memory.

    Each worker takes the whole weights; engines that share a GPU take one copy each, one after the other.
    """
    groups = grouped(config, "cuda")
    taken = [group.count("rollout") * (made.engine_gpu + made.shadow) for group in groups if group.count("rollout")]
    beside = made.rank_bytes if any(group.count("trainer") and group.count("rollout") for group in groups) else 0
    free = made.gpu_gib * GIB - max(taken) + made.shadow - beside
    return made.device != "cpu" and made.shadow > 0 and free > SPARE * made.shadow


def kept_weights(config: Config, weights: int, adapter: int) -> int:
    """Bytes of a checkpoint's weights in the model's precision."""
    if not config.train.lora:
        return weights
    return adapter + (weights if config.checkpoint.merged else 0)


def copies(config: Config) -> int:
    """Checkpoints that lie in their folder at the worst moment: those kept, the best, and one that is being written."""
    return config.checkpoint.keep + 2


def micro_batch_tokens(config: Config, shape: Shape, size: int, held: int, gpu_gib: float) -> int:
    """`train.tokens_per_micro_batch`; for auto on a GPU what would be measured there, by these estimates."""
    train, ahead = config.train, config.rollout.max_staleness
    if train.tokens_per_micro_batch != "auto" or config.cluster.device == "cpu":
        return config.fixed_tokens
    resting = config.rollout.engines_per_gpu * RESTING if config.cluster.colocate else 0
    gpu, copies = gpu_gib * GIB - resting, shape.parameters * size * (ahead + 1 if ahead else 0)
    head = head_bytes(shape, GRAIN, *of_head(config, size))
    room = ROOM * min(1.0, train.gpus_per_rank or 1.0) * gpu - gpu / LOGITS - copies - held - head
    fitting = int(room) // activation_bytes(shape, 1, size, train.gradient_checkpointing) // GRAIN * GRAIN
    return max(min(fitting, MOST_TOKENS), config.model.max_length)


def activation_bytes(shape: Shape, tokens: int, size: int, checkpointing: bool) -> int:
    """Activations of a packed forward pass; with checkpointing only each layer's input and one layer's inside."""
    if checkpointing:
        return tokens * size * (shape.layers * shape.hidden + shape.activations_per_layer)
    return tokens * size * shape.layers * shape.activations_per_layer


def of_head(config: Config, size: int) -> tuple[bool, bool]:
    """Whether the head's weights, of so many bytes a number, are frozen, and whether they are widened to float32."""
    return config.train.lora is not None, config.model.fp32_head and size < FP32


def head_bytes(shape: Shape, tokens: int, frozen: bool, widened: bool) -> int:
    """One chunk's fp32 logits and log-softmax, and the head's fp32 gradient, which a frozen one has not.

    And its weights once more where they are `widened`.
    """
    matrix = shape.vocab * shape.hidden * FP32
    return 2 * min(tokens, HEAD_CHUNK) * shape.vocab * FP32 + matrix * ((not frozen) + widened)


def pods(made: Plan, config: Config) -> dict[str, Pod]:
    """Memory of the controller and of one actor of each role. For cluster.device auto: as on GPUs."""
    split = config.rollout.tensor_parallel
    queues = (split + 1) * QUEUE if split > 1 else 0
    engine, rank = PROCESS["rollout"] * split, PROCESS["trainer"] + kept_on_host(made, config)
    shm = {"controller": 0, "rollout": queues, "trainer": 0}
    if made.device != "cpu":
        engine, rank = engine + CUDA_HOST * split, rank + CUDA_HOST + made.host
        shm = {"controller": 0, "rollout": queues + split * NCCL_SHM, "trainer": NCCL_SHM}
    else:
        engine, rank = engine + made.sync_bytes + config.rollout.kv_cache_gib * GIB, rank + made.rank_bytes
    if not made.shadow_on_gpu:
        engine += split * made.shadow
    memory = {"controller": PROCESS["controller"] + TOKEN * made.tokens, "rollout": engine, "trainer": rank}
    return {role: Pod(int(memory[role]), shm[role] + made.object_store) for role in memory}


def kept_on_host(made: Plan, config: Config) -> int:
    """What rank 0 copies to the host: its share of a checkpoint, and versions of the weights that travel."""
    share = MASTER * made.trained // config.train.ranks
    saving = (
        made.checkpoint - MASTER * made.trained + share if config.checkpoint.background else min(SAVED_AT_ONCE, share)
    )
    ahead = config.rollout.max_staleness
    return saving + (made.sync_bytes * (ahead + 1) if ahead else 0)


def gpu_problems(made: Plan, config: Config) -> list[str]:
    """Why the run cannot fit its GPUs, with the way out; nothing for cluster.device cpu."""
    if made.device == "cpu":
        return []
    found, limit = [], made.gpu_gib * GIB
    if made.rank_bytes > limit:
        found.append(
            f"a trainer rank needs {gib(made.rank_bytes)} of a GPU's {made.gpu_gib:g} GiB: raise train.zero_stage or "
            "train.ranks, lower train.tokens_per_micro_batch, set train.gradient_checkpointing, or "
            "train.offload_optimizer: cpu with zero_stage: 2"
        )
    elif config.cluster.colocate and need_of_ranks_gpu(made, config) > limit:
        found.append(turns_problem(made, config.rollout.engines_per_gpu, limit))
    elif (beside := engines_beside_rank(config)) and need_of_ranks_gpu(made, config) > limit:
        found.append(
            f"a rank and {'an engine' if beside == 1 else f'{beside} engines'} that share a GPU need "
            f"{gib(need_of_ranks_gpu(made, config))} of its {made.gpu_gib:g} GiB: lower "
            "rollout.memory_utilization, or give each a GPU of its own"
        )
    elif reason := crowded(config, "cuda"):
        found.append(reason)
    if made.kv_tokens_gpu < config.model.max_length:
        several = config.rollout.engines_per_gpu > 1
        way_out = "lower rollout.engines_per_gpu" if several else "raise rollout.tensor_parallel"
        found.append(f"an engine's GPU cannot hold one row beside the weights: {way_out}")
    return found


def need_of_ranks_gpu(made: Plan, config: Config) -> int:
    """Bytes of the GPU of a rank at the worst moment, with those of the engines on it."""
    engines = engines_beside_rank(config)
    if not config.cluster.colocate:
        return made.rank_bytes + engines * made.engine_gpu
    return max(made.rank_bytes + engines * RESTING, made.resident_bytes + engines * made.engine_gpu)


def turns_problem(made: Plan, engines: int, limit: float) -> str:
    """Why a rank and engines cannot take turns on a GPU: in the rank's turn, or in theirs."""
    if made.rank_bytes + engines * RESTING > limit:
        return (
            f"while engines rest a rank needs {gib(made.rank_bytes)} and each of them about {gib(RESTING)} of a GPU's "
            f"{made.gpu_gib:g} GiB: lower train.tokens_per_micro_batch, raise train.ranks with train.zero_stage, or "
            "set train.gradient_checkpointing"
        )
    share = max(0.0, 1 - made.resident_bytes / limit)
    return (
        f"while engines sample the rank on their GPU keeps {gib(made.resident_bytes)} of {made.gpu_gib:g} GiB: lower "
        f"rollout.memory_utilization to {int(100 * share) / 100:g}"
    )


def engines_beside_rank(config: Config) -> int:
    """How many engines at most share the GPU of a rank, where nodes host both roles."""
    groups = grouped(config, "cuda")
    return max(group.count("rollout") * bool(group.count("trainer")) for group in groups)


def cpu_problems(made: Plan, config: Config) -> list[str]:
    """What an engine on a CPU lacks, with the way out; nothing where it runs on a GPU."""
    if made.device == "cuda" or made.kv_tokens_cpu >= config.model.max_length:
        return []
    return [f"on a CPU, rollout.kv_cache_gib holds {made.kv_tokens_cpu} tokens, less than model.max_length: raise it"]


def cannot_fit(made: Plan) -> bool:
    """Whether the run would fail for want of memory on the device that it names; auto may still choose the other."""
    return bool(made.warnings) and made.device != "auto"


def gib(size: float) -> str:
    """Bytes as people read them: GiB, below that MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
