"""Every knob of a run: frozen, closed, documented in place. `grpo config schema` prints this file as JSON schema."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from grpo.config.algorithm import Algorithm
from grpo.config.colocated import why_not_colocated
from grpo.config.data import Data
from grpo.config.fields import (
    MOST_ROWS,
    Actors,
    Commit,
    Folder,
    FolderOrBucket,
    Gibibytes,
    Line,
    Place,
    Positive,
    RayLabel,
    RunName,
    Seconds,
    Temperature,
    Variable,
)
from grpo.config.rewards import RewardFunction, RewardHttp
from grpo.config.rollout import Rollout
from grpo.config.section import Section
from grpo.config.sft import Sft
from grpo.config.train import Train, no_offload
from grpo.config.variants import VARIANTS, with_preset

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


class Sync(Section):
    """How new weights reach the engines, and how that is proved."""

    every: Positive = 1
    """Steps between two weight syncs; samples are then up to every - 1 versions older."""
    transport: Literal["auto", "nccl", "gloo", "ipc"] = "auto"
    """auto: ipc (engines read the trainer's GPU memory) on one node, nccl between nodes, gloo on the CPU."""
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
