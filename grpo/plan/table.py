"""The plan as people read it: what each role holds on its device, what its pod needs, what storage needs."""

import math

from rich.table import Table

from grpo.config import Config
from grpo.plan.forecast import Forecast
from grpo.plan.memory import GIB, Plan, gib, gpu_problems, need_of_ranks_gpu
from grpo.plan.placement import crowded, gpus_of
from grpo.plan.speed import Step
from grpo.plan.splits import Split

NONE = "-"


def tables(made: Plan, config: Config) -> list[Table]:
    """In the order in which they are read."""
    return [run_table(made, config), device_table(made, config), pod_table(made, config)]


def run_table(made: Plan, config: Config) -> Table:
    """Sizes of the model, of a step and of a checkpoint."""
    out = Table(title="plan", show_header=False, title_justify="left")
    out.add_column(style="bold")
    out.add_column(justify="right")
    out.add_row("parameters", f"{made.parameters:,}")
    out.add_row("bytes of a weight sync", f"{made.sync_bytes:,}")
    out.add_row("step: completions", f"{made.rows:,}")
    out.add_row("step: tokens, at most", f"{made.tokens:,}")
    out.add_row("step: optimizer updates", f"{made.updates:,}")
    auto = config.train.tokens_per_micro_batch == "auto" and made.device != "cpu"
    out.add_row("tokens of a micro-batch", f"about {made.micro_batch:,} (auto)" if auto else f"{made.micro_batch:,}")
    out.add_row("checkpoint", gib(made.checkpoint))
    return out


def device_table(made: Plan, config: Config) -> Table:
    """One engine's GPU beside one rank's; on the CPU the engine's and the rank's memory."""
    on_cpu = made.device == "cpu"
    where = "CPU" if on_cpu else f"GPU of {made.gpu_gib:g} GiB"
    cache = made.kv_tokens_cpu * made.kv_per_token if on_cpu else max(0, made.engine_gpu - made.engine_weights)
    out = Table(title=f"on each {where}", title_justify="left")
    out.add_column("", style="bold")
    out.add_column("rollout: engine", justify="right")
    out.add_column("trainer: rank", justify="right")
    out.add_row("weights", gib(made.engine_weights), gib(made.weights))
    out.add_row("KV cache", gib(cache), NONE)
    if made.shadow:
        here = on_cpu or made.shadow_on_gpu
        out.add_row("next weights (rollout.max_staleness)", gib(made.shadow) if here else "in host memory", NONE)
    out.add_row("reference", NONE, gib(made.reference))
    out.add_row("gradients", NONE, gib(made.gradients))
    offloaded = config.train.offload_optimizer == "cpu"
    out.add_row("optimizer", NONE, "in host memory" if offloaded else gib(made.optimizer))
    out.add_row("activations", NONE, gib(made.activations))
    out.add_row("head", NONE, gib(made.head), end_section=True)
    shadow = made.shadow if on_cpu or made.shadow_on_gpu else 0
    out.add_row("sum", gib(made.engine_weights + cache + shadow), gib(made.rank_bytes))
    tokens = made.kv_tokens_cpu if on_cpu else made.kv_tokens_gpu
    out.add_row("tokens in the cache", f"{tokens:,}", NONE)
    out.add_row("verdict", *verdicts(made, config, tokens))
    return out


def verdicts(made: Plan, config: Config, tokens: int) -> tuple[str, str]:
    """Of the engine and of the rank. What a rank takes on the CPU is judged against its pod's limit, by preflight."""
    engine = "fits" if tokens >= config.model.max_length and not crowded(config, made.device) else "does not fit"
    if made.device == "cpu":
        return engine, NONE
    share = need_of_ranks_gpu(made, config)
    rank = f"fits ({share / (made.gpu_gib * GIB):.0%})" if share <= made.gpu_gib * GIB else "does not fit"
    assert ("does not fit" in (engine, rank)) == bool(gpu_problems(made, config))
    return engine, rank


def pod_table(made: Plan, config: Config) -> Table:
    """What the values of the chart should at least say, with one engine and one rank to a pod."""
    out = Table(title="each pod, with one engine or one rank in it", title_justify="left")
    out.add_column("", style="bold")
    for name in ("head: controller", "rollout", "trainer"):
        out.add_column(name, justify="right")
    pods = [made.pods[role] for role in ("controller", "rollout", "trainer")]
    on_gpu = made.device != "cpu"
    gpus = [f"{math.ceil(gpus_of(config, role))}" if on_gpu else "0" for role in ("rollout", "trainer")]
    out.add_row("pods", "1", config.rollout.engines_in_words, str(config.train.ranks))
    out.add_row("GPUs", "0", *gpus)
    out.add_row("/dev/shm", *(gib(pod.shm) for pod in pods))
    out.add_row("of it, Ray's object store", *(gib(made.object_store) for _ in pods))
    out.add_row("memory limit, /dev/shm included", *(whole_gib(pod.memory + pod.shm) for pod in pods))
    volume = f"{whole_gib(made.volume)} for checkpoint.keep = {config.checkpoint.keep}"
    out.caption = f"volume or bucket of checkpoints: {volume}, the best one, and one that is being written"
    out.caption_justify = "left"
    return out


def whole_gib(size: float) -> str:
    """As a quantity of Kubernetes, rounded up."""
    return f"{math.ceil(size / GIB)}Gi"


def speed_lines(told: Forecast) -> list[str]:
    """Seconds a step and the best splits, a line each; why there are none."""
    if told.own is None:
        return [f"speed: {told.note}"]
    work = told.work
    lines = [
        f"speed, {told.source}: prompts of {work.prompt_tokens:.0f} tokens, "
        f"completions of {work.completion_tokens:.0f}",
        f"this run, {layout(told.own)}: {seconds(told.own.step)}",
    ]
    lines += (
        [f"with all that may join, {layout(told.most)}: {seconds(told.most.step)}{why(told.most)}"] if told.most else []
    )
    lines += [f"best splits of {told.gpus} GPUs:"] if told.splits else []
    lines += [f"  {layout(split)}: {seconds(split.step)}{why(split)}" for split in told.splits]
    if told.measured_seconds:
        lines.append(f"measured in that run: {told.measured_seconds:.2f} s a step (median)")
    return [*lines, f"note: {told.note}"] if told.note else lines


def layout(split: Split) -> str:
    """`2 engines x 4 GPUs, 8 ranks`."""
    step = split.step
    engines = f"{step.engines} engine{'s' * (step.engines > 1)}"
    parallel = f" x {step.tensor_parallel} GPUs" if step.tensor_parallel > 1 else ""
    return f"{engines}{parallel}, {step.ranks} rank{'s' * (step.ranks > 1)}"


def seconds(step: Step) -> str:
    """What a step takes, by part, and how idle both pools are."""
    return (
        f"{step.seconds:.2f} s a step (sampling {step.sampling:.2f}, training {step.training:.2f}, "
        f"sync {step.sync:.2f}); idle: engines {step.rollout_idle:.0%}, ranks {step.trainer_idle:.0%}"
    )


def why(split: Split) -> str:
    """What is wrong with a split, behind its line."""
    return f"; does not fit: {split.problem}" if split.problem else ""
