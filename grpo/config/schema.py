"""Every knob of a run: frozen, closed, documented in place. `grpo config schema` prints this file as JSON schema."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.algorithm import Algorithm
from grpo.config.colocated import why_not_colocated
from grpo.config.data import Data
from grpo.config.engines import EnginesOrRange, bounds
from grpo.config.fields import (
    Actors,
    BoolOrAuto,
    Commit,
    Decay,
    Folder,
    FolderOrBucket,
    Gibibytes,
    Gpus,
    Line,
    Place,
    Positive,
    RayLabel,
    RunName,
    Seconds,
    StopText,
    Temperature,
    Tokens,
    TokensOrAuto,
    Variable,
)
from grpo.config.lora import Lora
from grpo.config.rewards import RewardFunction, RewardHttp
from grpo.config.section import Section
from grpo.config.sft import Sft
from grpo.config.variants import VARIANTS, with_preset

MOST_ROWS = 2**20
"""Completions of a step; all of them are held by one process."""

AUTO_TOKENS = 8192
"""Of a micro-batch on a CPU, where more are slower."""


class Run(Section):
    """Which run this is, how long it goes, and what it does when it starts again or is told to end."""

    name: RunName = "grpo"
    """Name of the run: a label on every metric and the name of the RayJob."""
    dir: Folder = "runs/grpo"
    """Folder of the run, not a link to one: resolved config, metrics, samples, report, checkpoints."""
    results: FolderOrBucket | None = None
    """Folder or s3://bucket/prefix to copy policy, report and metrics.jsonl to, below run.name, once it is done."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a run that the folder holds resumes from its newest valid checkpoint; never: such a folder is refused."""
    restart: Line | None = None
    """Any text; another one than before lets a run start again that ended for good (FATAL.json), its cause mended."""
    allow_drift: tuple[Line, ...] = ()
    """Keys that may differ from those of the run that is resumed, such as train.learning_rate or data.source."""
    lease_seconds: Seconds = 30
    """A run whose heartbeat in its folder is older than this counts as dead, and another start may resume it."""
    grace_seconds: Seconds = 30
    """Seconds between SIGTERM and SIGKILL: what a stopped run may use to commit (terminationGracePeriodSeconds)."""
    max_recoveries: int = Field(3, ge=0, le=1000)
    """Times that lost engines or trainer ranks are replaced without a checkpoint in between before the run gives up."""
    max_steps_without_signal: int = Field(50, ge=0, le=1_000_000_000)
    """Steps in a row whose groups all have equal rewards, and so teach nothing, before the run gives up."""
    steps: Positive = 100
    """Number of GRPO steps."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of the data order, of every completion and of the shuffled minibatches."""


class Model(Section):
    """The policy to begin with."""

    path: Place
    """Folder in Hugging Face format (config.json, safetensors, tokenizer) or the id of a model on the hub."""
    revision: Commit | None = None
    """Commit (40 hex digits) of the hub model; needed for a hub id, as a branch can move; a folder has none."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in the engine and of the forward pass in the trainer (its optimizer states are fp32)."""
    max_length: int = Field(2048, ge=8, le=10_000_000)
    """Longest prompt plus completion, in tokens."""
    fp32_head: bool = False
    """Compute logits in float32, in engine and trainer, from weights of another dtype: ratios are nearer to 1."""


class RewardCode(Section):
    """How the user's own reward functions ("module:function") are run: in processes of their own, with limits."""

    workers: Actors = 2
    """Worker processes that score side by side."""
    seconds: Seconds = 10
    """Longest time of one call; then the worker is killed, replaced, and the call counts as failed."""
    memory_gib: Gibibytes = 2.0
    """Memory of a worker, in GiB; above it an allocation fails inside the worker."""
    on_failure: Literal["drop_sample", "drop_group", "abort"] = "drop_sample"
    """What a failed call (never a reward of 0) does: leave out the sample, its whole group, or end the run."""
    max_failures: float = Field(0.1, ge=0, le=1)
    """Share of a step's calls that may fail; above it the run ends whatever on_failure says."""
    environment: tuple[Variable, ...] = ()
    """Names of environment variables that reward code may see; all others, with their secrets, are withheld."""
    folder: Place | None = None
    """Folder in which reward functions' modules are looked for first, and which they may read, besides `readable`."""
    revision: Line | None = None
    """What stands for the content of reward code, such as a commit or a digest: another one is another run's."""
    readable: tuple[str, ...] = ()
    """Files and folders that reward code may read, besides Python's own and the modules in the working folder."""
    network: bool = False
    """Whether reward code may open network connections."""
    isolation: Literal["auto", "none"] = "auto"
    """auto: behind a fence (Landlock, seccomp), refused where it cannot be whole; none: reward code is trusted."""


class Rollout(Section):
    """How completions are sampled, and what the engines may use for it."""

    engines: EnginesOrRange = 1
    """Number of vLLM engines, or {min, max}: they come and go with nodes. Each step's prompts are shared evenly."""
    prompts_per_step: int = Field(32, ge=1, le=MOST_ROWS)
    """Prompts of a step (P)."""
    samples_per_prompt: int = Field(8, ge=2, le=MOST_ROWS)
    """Completions of a prompt (G, the N_ROLLOUTS of the original recipe)."""
    max_tokens: Tokens = 512
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, ge=0.01, le=100)
    """Sampling temperature of the rollouts; the trainer applies it too. vLLM would sample below 0.01 as at 0.01."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the rollouts; only 1 trains, as the trainer's logprobs are over the whole vocabulary."""
    top_k: int = Field(0, ge=0, le=10_000_000)
    """Likeliest tokens that a rollout samples from; 0: all. Anything else is refused: the trainer means all tokens."""
    stop: tuple[StopText, ...] = Field((), max_length=16)
    """Texts that end a completion, with the token that completes one, which stays; the reason is then "stop"."""
    skip_special_tokens: bool = False
    """Leave all special tokens out of the text that rewards see, not only those that end or pad a completion."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Batches that are sampled ahead of training, from weights that are so many versions older. 0: none."""
    update: Literal["between_batches", "in_flight"] = "between_batches"
    """When engines take new weights, if batches are sampled ahead. in_flight: in the middle of completions."""
    refill: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by further prompts (DAPO's dynamic sampling)."""
    max_refills: int = Field(3, ge=1, le=1000)
    """Rounds of further prompts of a step; what is equal in the last one stays in the batch."""
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """GPUs of an engine."""
    engines_per_gpu: int = Field(1, ge=1, le=16)
    """Engines that share a GPU, where one Python thread, which feeds each, is slower than the GPU. 1 on the CPU."""
    gpus_per_engine: Gpus | None = None
    """Ray GPUs an engine reserves; null: tensor_parallel on CUDA. Below 1: a share of one, beside a rank or engines."""
    memory_utilization: float = Field(0.9, gt=0, lt=1)
    """Share of the GPU's memory that an engine takes; of all together with engines_per_gpu."""
    kv_cache_gib: Gibibytes = 1.0
    """KV cache of an engine on the CPU, in GiB."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs and compilation: starts sooner, samples slower."""

    @property
    def fewest_engines(self) -> int:
        """Engines that the run starts with."""
        return bounds(self.engines)[0]

    @property
    def most_engines(self) -> int:
        """Engines that it may have."""
        return bounds(self.engines)[1]

    @property
    def elastic(self) -> bool:
        """Whether engines come and go."""
        return self.fewest_engines < self.most_engines

    @property
    def engines_in_words(self) -> str:
        """`2`, or `1 to 3`."""
        return f"{self.fewest_engines}" + f" to {self.most_engines}" * self.elastic

    @property
    def engine_memory(self) -> float:
        """Share of a GPU's memory of one engine."""
        return self.memory_utilization / self.engines_per_gpu

    @property
    def sharing(self) -> int:
        """Engines on one GPU, at most."""
        share = self.gpus_per_engine or 1.0
        return self.engines_per_gpu if share >= 1 else max(1, min(self.most_engines, int(1.0001 / share)))

    @field_validator("samples_per_prompt", mode="before")
    @classmethod
    def _refuse_a_group_of_one(cls, count: object) -> object:
        if count in (1, "1") and not isinstance(count, bool):
            raise ValueError(
                "must be greater than or equal to 2, as a completion is compared with the others of its prompt: one "
                "alone has the advantage 0 and teaches nothing"
            )
        return count

    @model_validator(mode="after")
    def _check_shared(self) -> "Rollout":
        other = "tensor_parallel" if self.tensor_parallel > 1 else "gpus_per_engine"
        if self.engines_per_gpu > 1 and (self.tensor_parallel > 1 or self.gpus_per_engine is not None):
            raise ValueError(
                f"engines that share a GPU have one each: rollout.engines_per_gpu = {self.engines_per_gpu}, but "
                f"rollout.{other} = {getattr(self, other):g}; remove one of them"
            )
        if self.elastic and self.engines_per_gpu == 1 and (self.gpus_per_engine or 1) < 1:
            raise ValueError(
                f"engines that come and go share no GPU with a rank: rollout.engines has min and max, but "
                f"rollout.gpus_per_engine = {self.gpus_per_engine:g}; remove it, or write engines_per_gpu"
            )
        if self.elastic and (self.fewest_engines % self.engines_per_gpu or self.most_engines % self.engines_per_gpu):
            raise ValueError(
                f"engines that share a GPU come and go together: rollout.engines = {{min: {self.fewest_engines}, "
                f"max: {self.most_engines}}} must be multiples of rollout.engines_per_gpu = {self.engines_per_gpu}"
            )
        return self


class Train(Section):
    """How the policy is updated, and by how many ranks."""

    ranks: Actors = 1
    """DeepSpeed data-parallel ranks, one actor each."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what the ranks shard (1 optimizer states, 2 also gradients, 3 also weights)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: fp32 weights and AdamW's moments lie in host memory, where its CPU updates them: less of a GPU, slower."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu, at zero_stage 3, with offload_optimizer: weights too, which come to the GPU layer by layer; much slower."""
    gpus_per_rank: Gpus | None = None
    """Ray GPUs a rank reserves; null: 1 on CUDA, 0 on CPU."""
    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine reach 0 behind run.steps, also a new one."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """GRPO steps over which the learning rate rises from 0; at most run.steps."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled weight decay of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    """Gradients are scaled down to this global norm."""
    epochs: int = Field(1, ge=1, le=1000)
    """Passes over each step's batch."""
    minibatches: Positive = 1
    """Shuffled minibatches of a pass; each is one optimizer update."""
    tokens_per_micro_batch: TokensOrAuto = "auto"
    """Token budget of one packed forward pass; auto: what a GPU takes, on the CPU 8192 or model.max_length."""
    max_skipped_updates: int = Field(3, ge=0, le=1_000_000)
    """Updates in a row with a loss or gradient that is not finite that are skipped; one more ends the run."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    compile: BoolOrAuto = "auto"
    """Run the decoder layers under torch.compile; auto: on GPUs below zero_stage 3. Not as bit-stable as without."""
    lora: Lora | None = None
    """Train a low-rank adapter alone; engines get it merged. {}: one of rank 16 on all linear layers; null: none."""

    @property
    def offloads(self) -> tuple[str, ...]:
        """The keys that move something to the host's memory."""
        return tuple(key for key in ("offload_optimizer", "offload_param") if getattr(self, key) == "cpu")

    @model_validator(mode="after")
    def _check_offload(self) -> "Train":
        if self.offload_param == "cpu" and self.zero_stage != 3:
            raise ValueError(
                "weights can leave the GPU where each layer's are fetched for its turn, at ZeRO stage 3: "
                f"train.offload_param is cpu, but train.zero_stage = {self.zero_stage}; use zero_stage: 3, or "
                "offload_optimizer alone"
            )
        if self.offload_optimizer == "cpu" and self.zero_stage < 2:
            raise ValueError(
                "optimizer states leave the GPU with their rank's part of the gradients, from ZeRO stage 2 on "
                "(at stage 1 DeepSpeed may add an update's to the next): train.offload_optimizer is cpu, but "
                f"train.zero_stage = {self.zero_stage}; use zero_stage: 2, also for one rank"
            )
        if self.offload_param == "cpu" and self.offload_optimizer != "cpu":
            raise ValueError(
                "DeepSpeed updates weights where its optimizer lies: train.offload_param is cpu, but "
                "train.offload_optimizer = none; set it to cpu, too"
            )
        if self.offload_optimizer == "cpu" and self.lora and self.offload_param != "cpu":
            raise ValueError(
                "only an adapter's own optimizer states are held, which are small, and their way to the host would "
                "cost more than they take: train.offload_optimizer is cpu beside train.lora; remove it, or let the "
                "frozen weights go along with zero_stage: 3 and offload_param: cpu"
            )
        return self


def no_offload(keys: Sequence[str], found: str) -> str:
    """Why nothing is offloaded on a CPU."""
    return (
        "offloading moves what a GPU holds to the host's memory, where on a CPU all of it lies already: "
        f"train.{keys[0]} is cpu, but {found}; remove it"
    )


class Sync(Section):
    """How new weights reach the engines, and how that is proved."""

    every: Positive = 1
    """Steps between two weight syncs; samples are then up to every - 1 versions older."""
    transport: Literal["auto", "nccl", "gloo", "ipc"] = "auto"
    """auto: nccl between GPUs; ipc (engines read the trainer's GPU memory) where roles share them; gloo on the CPU."""
    tolerance: float | None = Field(None, gt=0, le=100)
    """Largest mean difference, in nats, of trainer and engine logprobs in the self-test; null: by the dtype."""
    max_mismatch: float | None = Field(None, gt=0, le=100)
    """Largest KL(sampler || trainer) per token, in nats, of samples of the newest weights; null: by the dtype."""


class Eval(Section):
    """The held-out prompts, and how often they are scored."""

    every: int = Field(0, ge=0, le=1_000_000_000)
    """Steps between two evaluations; 0: before the first and after the last step only."""
    source: Place | None = None
    """Source of the held-out prompts as in data.source; null: data.source."""
    subset: Line | None = None
    """Configuration of eval.source on the hub; without eval.source, data.subset counts."""
    revision: Commit | None = None
    """Commit (40 hex digits) of eval.source on the hub; without eval.source, data.revision counts."""
    split: Line = "test"
    """Split of the held-out prompts."""
    prompts: int = Field(128, ge=0, le=MOST_ROWS)
    """Held-out prompts of an evaluation; 0 evaluates nothing."""
    samples_per_prompt: int = Field(1, ge=1, le=MOST_ROWS)
    """Completions of a held-out prompt, for pass@k and maj@k."""
    temperature: Temperature = 1.0
    """Temperature of the evaluation; 0 is greedy."""


class Checkpoint(Section):
    """What is kept of a run, and where."""

    every: int = Field(10, ge=0, le=1_000_000_000)
    """Steps between two checkpoints, a multiple of sync.every (a resumed run is then the same); 0: at the end only."""
    dir: FolderOrBucket | None = None
    """Where checkpoints go: a folder that all nodes share, or s3://bucket/prefix; null: run.dir/checkpoints."""
    background: bool = True
    """Write checkpoints while the next steps train: the host then holds a copy of the trainer's whole state."""
    merged: bool = True
    """With train.lora: keep the whole policy too, merged. false: the adapter alone, which is small."""
    keep: Positive = 2
    """Newest checkpoints that are kept; older ones go once a newer one is verified."""
    keep_best: bool = True
    """Also keep the checkpoint with the best score: accuracy of the last evaluation, without one the mean reward."""


class Metrics(Section):
    """Who is told the numbers of a run."""

    port: int | None = Field(None, ge=0, le=65535)
    """Port of /metrics for Prometheus; 0 picks a free one, null serves none."""
    completions_per_step: int = Field(4, ge=0, le=MOST_ROWS)
    """Groups of each step whose completions are written to samples.jsonl."""
    trace: bool = False
    """Write trace.json, what each pool did when, for Perfetto and Chrome."""
    wandb_project: Line | None = None
    """Weights & Biases project; needs `pip install wandb`."""
    mlflow_uri: Line | None = None
    """MLflow tracking URI; needs `pip install mlflow-skinny`."""


class Cluster(Section):
    """The machines, and which of them may host what."""

    address: Line | None = None
    """Address of a running Ray cluster ("auto" inside a RayJob); null starts Ray on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines and ranks run; auto: cuda if the cluster has GPUs."""
    colocate: bool = False
    """Engines and ranks take turns on the same GPUs: an engine gives its memory away while the policy trains."""
    role_label: RayLabel = "grpo.dev/role"
    """Ray node label whose value (rollout or trainer) says what a node is for. Nodes without it take both roles."""
    environment: tuple[Variable, ...] = ()
    """Names of environment variables that a Ray on this machine gets although it would not: OMP_*, RAY_*, VLLM_* ..."""


class Deadlines(Section):
    """Longest wait of each phase; longer is an error that names the phase."""

    start: Seconds = 900
    rollout: Seconds = 1800
    reward: Seconds = 300
    train: Seconds = 1800
    sync: Seconds = 300
    save: Seconds = 600
    health: Seconds = 60
    """An actor that answers nothing for this long is frozen: its stacks are logged, it is killed and replaced."""


class Config(Section):
    """All of a run: one section below each key."""

    run: Run = Run()
    model: Model
    data: Data = Data()
    rewards: tuple[RewardFunction, ...] = Field((RewardFunction(),), min_length=1)
    reward_code: RewardCode = RewardCode()
    reward_http: RewardHttp = RewardHttp()
    rollout: Rollout = Rollout()
    algorithm: Algorithm = Algorithm()
    train: Train = Train()
    sync: Sync = Sync()
    eval: Eval = Eval()
    sft: Sft = Sft()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    cluster: Cluster = Cluster()
    deadlines: Deadlines = Deadlines()

    def rewards_of(self, source: str) -> tuple[RewardFunction, ...]:
        """Terms of the reward of the prompts of one of data.sources; of all others `rewards`."""
        own = next((one.rewards for one in self.data.sources if one.name == source), ())
        return own or self.rewards

    @property
    def all_rewards(self) -> tuple[RewardFunction, ...]:
        """Those of every source."""
        sources = [self.rewards_of(source.name) for source in self.data.sources] or [self.rewards]
        held_out = [self.rewards] if self.eval.prompts and self.eval.source else []
        return tuple(reward for rewards in [*sources, *held_out] for reward in rewards)

    @property
    def roles_share_gpus(self) -> bool:
        """Whether an engine and a rank are on one GPU, in turns or at the same time."""
        return self.cluster.colocate or (self.train.gpus_per_rank or 1.0) < 1.0

    @property
    def fixed_tokens(self) -> int:
        """`train.tokens_per_micro_batch`, for auto what it is where no GPU's memory is asked."""
        given = self.train.tokens_per_micro_batch
        return max(AUTO_TOKENS, self.model.max_length) if given == "auto" else given

    @property
    def default_correction(self) -> str:
        """What `algorithm.correction` is where it is null: samples that are older by design need one."""
        return "tis" if self.rollout.max_staleness and not VARIANTS[self.algorithm.loss].weighs else "none"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: object) -> object:
        return with_preset(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check_correction(self) -> "Config":
        algorithm = self.algorithm
        bounds = {"correction_low": algorithm.correction_low, "correction_high": algorithm.correction_high}
        given = [name for name, bound in bounds.items() if bound is not None]
        if given and algorithm.correction == "decoupled":
            raise ValueError(
                f"decoupled takes the whole weight: algorithm.{given[0]} = {bounds[given[0]]:g}, but "
                "algorithm.correction is decoupled; use tis, which bounds it, or remove the bound"
            )
        if given and (algorithm.correction or self.default_correction) == "none":
            raise ValueError(
                f"bounds need something that they bound: algorithm.{given[0]} = {bounds[given[0]]:g}, but "
                "algorithm.correction is none (its default without rollout.max_staleness); name a correction or remove "
                "the bound"
            )
        return self

    @model_validator(mode="after")
    def _check_elastic(self) -> "Config":
        share = self.train.gpus_per_rank or 1
        if self.rollout.elastic and self.rollout.engines_per_gpu > 1 and share < 1:
            raise ValueError(
                f"engines that come and go share no GPU with a rank: rollout.engines has min and max, but "
                f"train.gpus_per_rank = {share:g}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_colocated(self) -> "Config":
        if self.cluster.colocate and (problem := why_not_colocated(self)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> "Config":
        if self.cluster.device == "cpu" and self.train.offloads:
            raise ValueError(no_offload(self.train.offloads, "cluster.device is cpu"))
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> "Config":
        if not self.checkpoint.merged and not self.train.lora:
            raise ValueError(
                "a policy is left out of checkpoints where an adapter stands for it: checkpoint.merged is false, but "
                "without train.lora the policy is all that is trained; remove checkpoint.merged, or set train.lora"
            )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        rows = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        shares = self.train.minibatches * self.train.ranks
        if rows > MOST_ROWS:
            raise ValueError(
                f"a step's completions are held by one process: rollout.prompts_per_step x samples_per_prompt = {rows} "
                f"must be at most {MOST_ROWS}; lower one of them"
            )
        if rows < shares:
            raise ValueError(
                f"each rank needs a row of each minibatch: rollout.prompts_per_step x samples_per_prompt = {rows}, "
                f"train.minibatches x train.ranks = {shares}; lower train.minibatches"
            )
        by_name: dict[str, RewardFunction] = {}
        for reward in self.all_rewards:
            first = by_name.setdefault(reward.name, reward)
            if first.model_copy(update={"weight": reward.weight}) != reward:
                raise ValueError(
                    f"a reward is one thing for all data.sources, but {reward.name} is written in two ways; write one"
                )
        if self.rollout.max_tokens >= self.model.max_length:
            raise ValueError(
                f"a prompt needs room before its completion: rollout.max_tokens = {self.rollout.max_tokens} must be "
                f"below model.max_length = {self.model.max_length}; raise model.max_length"
            )
        if self.rollout.top_k:
            raise ValueError(
                f"trainer and sampler must mean the same distribution, but with rollout.top_k = {self.rollout.top_k} "
                "the sampler's leaves tokens out; use rollout.top_k: 0, and rollout.temperature for less variety"
            )
        if self.algorithm.overlong and self.algorithm.overlong.buffer > self.rollout.max_tokens:
            raise ValueError(
                f"the penalty grows over the last tokens of a completion: algorithm.overlong.buffer = "
                f"{self.algorithm.overlong.buffer} must be at most rollout.max_tokens = {self.rollout.max_tokens}"
            )
        if self.fixed_tokens < self.model.max_length:
            raise ValueError(
                f"the longest row must fit a micro-batch: train.tokens_per_micro_batch = "
                f"{self.fixed_tokens} is below model.max_length = {self.model.max_length}; raise it"
            )
        if self.rollout.top_p < 1:
            raise ValueError(
                f"trainer and sampler must mean the same distribution: with rollout.top_p = {self.rollout.top_p:g} the "
                "sampler renormalises a part of the vocabulary that the trainer does not know, and every ratio is too "
                "small; use rollout.top_p: 1, and rollout.temperature for samples that vary less"
            )
        if self.train.compile is True and self.train.zero_stage == 3:
            raise ValueError(
                "compiled layers need whole weights, but train.compile is true and train.zero_stage 3 cuts them; use "
                "train.compile: auto or a lower zero_stage"
            )
        if self.train.warmup_steps > self.run.steps:
            raise ValueError(
                f"the learning rate must reach its peak: train.warmup_steps = {self.train.warmup_steps} is above "
                f"run.steps = {self.run.steps}; lower train.warmup_steps"
            )
        if self.checkpoint.every % self.sync.every:
            raise ValueError(
                f"a checkpoint belongs to weights that the engines hold: checkpoint.every = {self.checkpoint.every} "
                f"must be a multiple of sync.every = {self.sync.every}"
            )
        return self
