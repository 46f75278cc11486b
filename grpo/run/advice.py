"""The error that a failure is for a user: of our tree, with what was running, the cause, and the key that helps."""

import re
from dataclasses import dataclass, replace

from grpo import errors
from grpo.config import Config
from grpo.errors import BugError, ClusterError, ConfigError, DiskError, EngineLost, GrpoError, OutOfMemory, TrainerLost
from grpo.run.failures import Failure, Kind
from grpo.run.memory import host_memory

PHASES = {
    "start": "start",
    "address": "start",
    "generate": "rollout",
    "step": "train",
    "evaluate": "train",
    "save": "save",
    "try_saving": "save",
    "snapshot": "save",
    "write": "save",
    "load": "resume",
    "close": "end",
    "run": "run",
}
"""Of the loop, by the verb that was called; all other verbs belong to a weight sync."""
NAMES = {"rollout": "engine", "trainer": "trainer rank"}
REFUSALS = {
    "OSError", "FileNotFoundError", "NotADirectoryError", "ValueError", "KeyError", "ImportError",
    "ModuleNotFoundError", "NotImplementedError", "SafetensorError", "ValidationError", "JSONDecodeError",
    "UnicodeDecodeError", "HFValidationError", "RepositoryNotFoundError", "GatedRepoError", "LocalEntryNotFoundError",
}  # fmt: skip
"""What a library raises while it loads a model that it cannot take."""
CACHE_TOO_SMALL = ("cache blocks", "available KV cache")
"""How vLLM says that the KV cache has no room."""
TAKEN_BY_OTHERS = "on startup is less than"
"""vLLM's words for memory that somebody else holds."""
LOST: dict[str, type[EngineLost] | type[TrainerLost]] = {"rollout": EngineLost, "trainer": TrainerLost}


@dataclass(frozen=True)
class Where:
    """What was running when something failed."""

    config: Config
    role: str
    index: int
    verb: str
    """Of the actor; or the phase itself."""
    device: str = ""

    @property
    def phase(self) -> str:
        """In the words of the loop."""
        return self.verb if self.verb in PHASES.values() else PHASES.get(self.verb, "weight sync")

    @property
    def on_cpu(self) -> bool:
        """Whether the machine's memory is the device's."""
        return "cpu" in (self.device, self.config.cluster.device)

    @property
    def who(self) -> str:
        """The worker's name."""
        return f"{NAMES[self.role]} {self.index}" if self.role in NAMES else "the controller"


def typed(failure: Failure, where: Where, trace: str = "") -> GrpoError:
    """The error of our tree. `trace` says where the traceback is, if it is kept.

    Only what another process or machine can help is a ClusterError, so that nothing else is tried again.
    """
    if failure.kind is Kind.BUG and where.phase == "start" and failure.error in REFUSALS:
        failure = replace(failure, kind=Kind.MODEL)
    head = f"{where.phase}: {where.who}"
    place = f" at {failure.place}" if failure.place else ""
    behind = f"{place}{f'; traceback: {trace}' if trace else ''}"
    if failure.kind is Kind.OURS:
        kind: type[GrpoError] = getattr(errors, failure.error, BugError)
        return kind(failure.text)
    made = _made(failure, where, head, behind)
    made.traceback, made.traceback_file = failure.traceback, trace
    return made


def _made(failure: Failure, where: Where, head: str, behind: str) -> GrpoError:
    config, text = where.config, failure.text
    match failure.kind:
        case Kind.MEMORY:
            return out_of_memory(failure, where, head, behind)
        case Kind.GPU:
            return LOST.get(where.role, ClusterError)(f"{head} lost its GPU: {text}")
        case Kind.CONNECTION:
            return ClusterError(f"{head} lost its connection: {text}")
        case Kind.DISK:
            return DiskError(
                f"{head} must be able to use its disk, but: {text}{behind}; free space there or mend the rights (the "
                f"run writes to run.dir = {config.run.dir}, checkpoint.dir, the folder of TMPDIR and /dev/shm)"
            )
        case Kind.LIMIT:
            return ConfigError(
                f"{head} needs more open files or threads than this machine lets it have: {text}{behind}; raise the "
                "limits of the shell or container that starts the run (ulimit -n, ulimit -u, pids.max)"
            )
        case Kind.LAYOUT:
            return ConfigError(
                f"{head}: each trainer rank needs a GPU of its own: {text}{behind}; change train.ranks, "
                "train.gpus_per_rank or rollout.gpus_per_engine"
            )
        case Kind.MODEL if failure.error in ("ImportError", "ModuleNotFoundError"):
            return ConfigError(
                f"{head} must be able to import what it and model.path = {config.model.path!r} need, but: {text}"
                f"{behind}; install the package where workers run (the image), or choose another model; a variable "
                "that lets a library do without must be named in cluster.environment"
            )
        case Kind.MODEL:
            return ConfigError(
                f"{head}: model.path = {config.model.path!r} must be a model that can be loaded and saved, but: {text}"
                f"{behind}; mend the model's files or choose another model"
            )
        case _:
            return BugError(
                f"{head} failed by a bug of grpo or of a library, and would fail again: {text}{behind}; {_start(where)}"
                "please report it with the traceback"
            )


def _start(where: Where) -> str:
    model = f"look whether the files of model.path = {where.config.model.path!r} are whole; "
    return model if where.phase == "start" else ""


def out_of_memory(failure: Failure, where: Where, head: str, behind: str) -> OutOfMemory:
    """Which memory, the numbers, and the keys that need less of it."""
    cache = any(text in failure.text for text in CACHE_TOO_SMALL)
    named = re.search(r"CUDA|GPU|HIP|NCCL|device cuda|CUBLAS|CUDNN", failure.text) is not None
    on_gpu = named or (cache and not where.on_cpu)
    numbers = failure.text if on_gpu or not failure.traceback else f"{failure.text} ({host_memory()})"
    place = " on its GPU" if on_gpu else ""
    made = OutOfMemory(f"{head} is out of memory{place}: {numbers}{behind}; {less_memory(failure.text, where)}")
    made.fatal = TAKEN_BY_OTHERS not in failure.text  # which may be gone at the next start
    return made


def less_memory(text: str, where: Where) -> str:
    """The way out, with the values that are set."""
    rollout, train, model = where.config.rollout, where.config.train, where.config.model
    share = f"rollout.memory_utilization (now {rollout.memory_utilization:g})"
    cache = f"rollout.kv_cache_gib (now {rollout.kv_cache_gib:g})" if where.on_cpu else share
    length = f"model.max_length (now {model.max_length})"
    fewer = f", or lower rollout.engines_per_gpu (now {rollout.engines_per_gpu})" * (rollout.engines_per_gpu > 1)
    if any(said in text for said in CACHE_TOO_SMALL):
        return f"raise {cache}, or lower {length}{'' if where.on_cpu else fewer}"
    if TAKEN_BY_OTHERS in text:
        return f"lower {share}, or end what else uses this memory"
    if where.role not in NAMES:
        return "give it more memory, or lower rollout.prompts_per_step x samples_per_prompt"
    if where.role == "rollout":
        parallel = fewer or ", or raise rollout.tensor_parallel"
        more = f" or {length}{parallel}" if where.phase == "start" else ""
        return f"lower {cache}{more}"
    if where.phase == "start":
        tried = train.tokens_per_micro_batch == "auto" and not where.on_cpu
        number = ", or give train.tokens_per_micro_batch as a number, which tries nothing" if tried else ""
        return f"raise train.zero_stage (to 3) or train.ranks, use model.dtype bfloat16, or a smaller model{number}"
    if where.phase == "save" and where.config.checkpoint.background and not re.search("CUDA|GPU", text):
        return "give it more memory, or set checkpoint.background: false, which needs no copy of the state on the host"
    budget = train.tokens_per_micro_batch
    shortest = budget != "auto" and budget <= model.max_length
    ways = {
        f"lower {f'{length} and ' if shortest else ''}train.tokens_per_micro_batch "
        f"(now {budget}{': give a number below the one that the start told' * (budget == 'auto')})": True,
        "set train.gradient_checkpointing: true": not train.gradient_checkpointing,
        f"raise train.zero_stage (now {train.zero_stage}) or train.ranks": train.zero_stage < 3,
        f"lower {share}, whose engine shares the GPU": (train.gpus_per_rank or 1) < 1,
    }
    return ", ".join(way for way, helps in ways.items() if helps)
