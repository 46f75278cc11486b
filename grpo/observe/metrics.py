"""The catalogue: one table of every metric, its Prometheus name, and the key under which a row carries it.

A key (`train/loss`) names the same number in `Stats`, in metrics.jsonl and in TensorBoard. Metrics without a key are
filled from samples or events. Naming: prefix grpo_, base units, _total for counters. Every series carries the label
`run`; other labels have few values and never text of a model. https://prometheus.io/docs/practices/naming/
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from statistics import fmean, pstdev
from typing import Literal

from grpo.rewards.process import KINDS, SERVICE_KINDS
from grpo.types import Group, Groups, Stats

PHASES = ("rollout", "reward", "advantage", "train", "weight_sync", "checkpoint", "eval")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
TOKENS = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0)
# The lowest bound is not negative: the Prometheus client drops _sum otherwise, and with it the mean.
REWARDS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STEPS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue. `keys` maps a key to its label value; in a pattern both have one `*`."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


def _gauge(name: str, unit: str, help: str, key: str) -> Metric:
    return Metric(name, "gauge", unit, help, keys={key: ""})


def _counter(name: str, unit: str, help: str, key: str) -> Metric:
    return Metric(name, "counter", unit, help, keys={key: ""})


def _histogram(name: str, unit: str, help: str, buckets: tuple[float, ...], key: str | None = None) -> Metric:
    return Metric(name, "histogram", unit, help, keys={key: ""} if key else {}, buckets=buckets)


# Keys that share a metric, and the value of its label
BY_PHASE = {f"phase/{phase}": phase for phase in PHASES}
BY_KIND = {f"rollout/{kind}_tokens": kind for kind in ("prompt", "completion")}
BY_BOUND = {f"train/clip_{bound}": bound for bound in ("low", "high")}
BY_FAILURE = {f"reward/failures_{kind}": kind for kind in (*KINDS, *SERVICE_KINDS)}
BY_REQUEST = {"reward/requests": "sent", "reward/retries": "repeated", "reward/cached": "saved"}
BY_PART = {"train/seconds_*": "*"}
BY_EXTREME = {f"train/rollout_abs_diff_{stat}": stat for stat in ("bounded", "p99", "max")}
BY_WEIGHT = {f"train/weight_{stat}": stat for stat in ("mean", "min", "max")}
BY_SIDE = {f"train/weight_{side}": side for side in ("above", "below")}
BY_LIMIT = {"train/weights_le_*": "*"}
EFFECTIVE, CHI_SQUARE, DROPPED = (
    {f"train/{name}_{of}": of for of in ("tokens", "sequences")} for name in ("ess", "chi2", "dropped")
)
BY_SOURCE = {"reward/source/*": "*"}
BY_FUNCTION = {"reward/function/*": "*"}
BY_DIFFICULTY = {f"curriculum/skipped_{difficulty}": difficulty for difficulty in ("easy", "hard")}
BY_POOL = {f"pipeline/{pool}_idle": pool for pool in ("rollout", "trainer")}
ENDS = [f"{end}_{part}" for end in ("send", "receive") for part in ("wire", "digest", "load")]
LEGS = ("connect", "self_test", "publish", "receive", "switch", "exchange", "verify", "commit", *ENDS)
BY_LEG = {f"sync/{part}_seconds": part for part in LEGS}
BY_WAIT = {f"checkpoint/{part}_seconds": part for part in ("stall", "durable")}
SCORES = ("accuracy", "pass@*", "maj@*", "reward", "completion_tokens", "truncated_ratio", "loss")
BY_SCORE = {f"eval/{score}": score for score in SCORES}

CATALOGUE: tuple[Metric, ...] = (
    # The run and its steps
    Metric("grpo_build_info", "gauge", "", "Version of the program; always 1.", ("version",)),
    Metric("grpo_run_info", "gauge", "", "What the run trains and how; always 1.", ("model", "loss")),
    _gauge("grpo_step", "steps", "Last finished GRPO step.", "step"),
    Metric("grpo_run_steps", "gauge", "steps", "Steps that the run is to make (run.steps)."),
    Metric("grpo_resumed_step", "gauge", "steps", "Step last resumed from, after a start or a lost trainer."),
    _gauge("grpo_last_step_timestamp_seconds", "unix seconds", "When the last step finished.", "time"),
    Metric("grpo_progress_timestamp_seconds", "gauge", "unix seconds", "Last phase begun or ended, actor replaced."),
    Metric("grpo_steps_total", "counter", "steps", "GRPO steps by outcome (ok, failed).", ("outcome",)),
    _histogram("grpo_step_duration_seconds", "seconds", "Duration of a step.", SECONDS, "step/seconds"),
    _gauge("grpo_step_tokens_per_second", "1/s", "Completion tokens by duration of step.", "step/tokens_per_second"),
    Metric("grpo_phase", "gauge", "", "1 for the phase that is running, 0 for the others.", ("phase",)),
    Metric("grpo_phase_duration_seconds", "histogram", "seconds", "Duration by phase.", ("phase",), BY_PHASE, SECONDS),
    Metric("grpo_start_seconds", "gauge", "seconds", "Last start of a role's slowest actor.", ("role", "phase")),
    Metric("grpo_phase_seconds_total", "counter", "seconds", "Time by phase, up to now; and between them.", ("phase",)),
    Metric("grpo_attempt", "gauge", "starts", "How often the run was started, this start included."),
    Metric("grpo_start_timestamp_seconds", "gauge", "unix seconds", "When this start of the run began."),
    Metric("grpo_deadline_seconds", "gauge", "seconds", "Longest wait by phase (deadlines.*).", ("phase",)),
    Metric("grpo_workers", "gauge", "actors", "By role; state is expected, ready or lost.", ("role", "state")),
    Metric("grpo_engines", "gauge", "actors", "Engines; state is wanted, healthy or joining.", ("state",)),
    Metric("grpo_engine_events_total", "counter", "events", "Engines that joined, left or failed to.", ("event",)),
    Metric("grpo_tracker_failures_total", "counter", "calls", "Calls of a tracker that failed.", ("tracker",)),
    Metric("grpo_recoveries_total", "counter", "replacements", "Lost actors replaced, by role.", ("role",)),
    Metric("grpo_recovery_timestamp_seconds", "gauge", "unix seconds", "Last replacement, by role.", ("role",)),
    _histogram("grpo_recovery_seconds", "seconds", "From a loss noticed to its end.", SECONDS, "recovery/seconds"),
    # Rewards and rollouts
    _histogram("grpo_reward", "", "Rewards of the samples.", REWARDS),
    _gauge("grpo_reward_mean", "", "Mean reward of the last step.", "reward/mean"),
    Metric("grpo_reward_mean_by_source", "gauge", "", "Mean reward by source (data.sources).", ("source",), BY_SOURCE),
    Metric("grpo_reward_mean_by_function", "gauge", "", "Mean by function, unweighted.", ("function",), BY_FUNCTION),
    _gauge("grpo_reward_stddev", "", "Standard deviation of the last step's rewards.", "reward/std"),
    _gauge("grpo_group_zero_variance_ratio", "share", "Groups of equal rewards: no signal.", "reward/zero_variance"),
    Metric("grpo_reward_failures_total", "counter", "calls", "Failed calls of reward code.", ("kind",), BY_FAILURE),
    _counter("grpo_reward_dropped_samples_total", "samples", "Samples without a reward.", "reward/dropped_samples"),
    _counter("grpo_reward_dropped_groups_total", "groups", "Groups without enough rewards.", "reward/dropped_groups"),
    Metric("grpo_reward_requests_total", "counter", "requests", "Requests to reward services.", ("kind",), BY_REQUEST),
    _histogram("grpo_completion_tokens", "tokens", "Length of the completions.", TOKENS),
    _gauge("grpo_completion_tokens_mean", "tokens", "Mean completion length of the last step.", "completion/tokens"),
    _gauge("grpo_completion_truncated_ratio", "share", "Completions cut in the last step.", "completion/truncated"),
    _gauge("grpo_overlong_penalty_mean", "", "Mean penalty for length (at most 0).", "completion/overlong_penalty"),
    Metric("grpo_completion_truncated_total", "counter", "completions", "Completions cut by max_tokens."),
    Metric("grpo_rollout_tokens_total", "counter", "tokens", "Tokens by kind; each prompt once.", ("kind",), BY_KIND),
    _histogram("grpo_sample_staleness_steps", "steps", "Weight versions between trainer and sample.", STEPS),
    _gauge("grpo_sample_staleness_mean_steps", "steps", "Mean lag of the last step's samples.", "rollout/staleness"),
    _gauge("grpo_skipped_groups_ratio", "share", "Sampled groups that others replaced.", "rollout/skipped_ratio"),
    Metric("grpo_curriculum_skipped_ratio", "gauge", "share", "Turns skipped.", ("difficulty",), BY_DIFFICULTY),
    _gauge("grpo_effective_groups_ratio", "share", "Sampled groups with an advantage.", "rollout/effective_groups"),
    _gauge("grpo_sample_staleness_max_steps", "steps", "Largest lag in the last step.", "rollout/staleness_max"),
    Metric("grpo_max_staleness_steps", "gauge", "steps", "rollout.max_staleness; 0: no overlap.", ("update",)),
    # The overlap of sampling and training
    Metric("grpo_pool_idle_ratio", "gauge", "share", "Time of the last step without work.", ("pool",), BY_POOL),
    _gauge("grpo_step_engines", "actors", "Engines that sampled at the end of the last step.", "pipeline/engines"),
    _gauge("grpo_rollout_queue_seconds", "seconds", "That the trainer waited for its batch.", "pipeline/queue_seconds"),
    _gauge("grpo_batches_ahead", "batches", "Batches that are drawn and wait to be trained.", "pipeline/batches_ahead"),
    # The trainer
    _gauge("grpo_loss", "", "Mean loss of the last step's updates.", "train/loss"),
    Metric("grpo_clip_ratio", "gauge", "share", "Tokens clipped, by bound (low, high).", ("bound",), BY_BOUND),
    _gauge("grpo_update_kl", "nats", "KL(policy before the step || policy) per token.", "train/approx_kl"),
    _gauge("grpo_policy_kl", "nats", "KL(policy || reference) per token.", "train/kl_reference"),
    _gauge("grpo_policy_kl_coef", "", "Weight of that KL, where algorithm.kl_target moves it.", "train/kl_coef"),
    _gauge("grpo_rollout_train_kl", "nats", "KL(sampler || trainer) per token: their mismatch.", "train/rollout_kl"),
    _gauge("grpo_rollout_train_abs_diff", "nats", "Mean |sampler - trainer| logprob.", "train/rollout_abs_diff"),
    _gauge("grpo_rollout_train_log_ratio_mean", "nats", "Mean log(sampler / trainer): k1.", "train/rollout_kl_k1"),
    Metric(
        "grpo_rollout_train_abs_diff_high",
        "gauge",
        "nats",
        "Its p99, maximum, and mean where a token counts 1 at most.",
        ("stat",),
        BY_EXTREME,
    ),
    _gauge(
        "grpo_rollout_train_prob_diff_max", "", "Largest difference of probabilities.", "train/rollout_prob_diff_max"
    ),
    _gauge("grpo_rollout_train_far_ratio", "share", "Tokens far off: no rounding.", "train/rollout_far"),
    _gauge("grpo_rollout_train_perplexity_ratio", "", "Trainer by sampler.", "train/rollout_perplexity_ratio"),
    Metric("grpo_correction_weight", "gauge", "", "Weight w = trainer / sampler, unbounded.", ("stat",), BY_WEIGHT),
    Metric("grpo_correction_weight_outlying_ratio", "gauge", "share", "w > C or < 1 / C.", ("side",), BY_SIDE),
    Metric(
        "grpo_correction_weights_total", "counter", "tokens", "Tokens with a w up to a bound.", ("up_to",), BY_LIMIT
    ),
    Metric("grpo_correction_dropped_ratio", "gauge", "share", "Dropped by a correction.", ("of",), DROPPED),
    Metric("grpo_effective_sample_ratio", "gauge", "share", "Effective sample size by w.", ("of",), EFFECTIVE),
    Metric("grpo_chi_square", "gauge", "", "chi2(trainer || sampler): mean w^2 - 1.", ("of",), CHI_SQUARE),
    _gauge("grpo_importance_weight_max", "", "Largest ratio of a token in the last step.", "train/ratio_max"),
    _gauge("grpo_entropy_nats", "nats", "Mean entropy of the policy per token.", "train/entropy"),
    _gauge("grpo_grad_norm", "", "Global gradient norm before clipping.", "train/grad_norm"),
    _gauge("grpo_learning_rate", "", "Learning rate of the last update.", "train/learning_rate"),
    _counter("grpo_unknown_logprobs_total", "tokens", "Sampler's logprob NaN: weight 1.", "train/unknown_logprobs"),
    _counter("grpo_train_tokens_total", "tokens", "Tokens that the trainer has processed.", "train/tokens"),
    _counter("grpo_train_updates_total", "updates", "Optimizer updates.", "train/updates"),
    _counter("grpo_train_skipped_updates_total", "updates", "Updates skipped: not finite.", "train/skipped"),
    Metric("grpo_train_part_seconds", "gauge", "seconds", "Time by part of training.", ("part",), BY_PART),
    # Weight sync, checkpoints, evaluation
    Metric("grpo_weight_sync_total", "counter", "syncs", "Weight syncs by result (ok, error).", ("result",)),
    _histogram("grpo_weight_sync_duration_seconds", "seconds", "Duration of a sync.", SECONDS, "sync/seconds"),
    Metric("grpo_weight_sync_part_seconds", "gauge", "seconds", "Last sync by part.", ("part",), BY_LEG),
    _counter("grpo_weight_sync_bytes_total", "bytes", "Bytes that the syncs have sent.", "sync/bytes"),
    _gauge("grpo_weight_snapshot_bytes", "bytes", "Published versions that the trainer keeps.", "sync/snapshot_bytes"),
    Metric("grpo_policy_version", "gauge", "steps", "Step whose weights a role holds (rollout, trainer).", ("role",)),
    _gauge("grpo_self_test_diff_nats", "nats", "Mean |trainer - engine| logprob at start.", "sync/self_test_diff"),
    Metric("grpo_checkpoint_step", "gauge", "steps", "Step of the newest checkpoint; 0 before the first."),
    Metric("grpo_checkpoint_every_steps", "gauge", "steps", "Steps between saves (checkpoint.every); 0: at the end."),
    Metric("grpo_checkpoint_size_bytes", "gauge", "bytes", "Size of the last checkpoint that was saved."),
    Metric("grpo_checkpoint_last_success_timestamp_seconds", "gauge", "unix seconds", "When a save last succeeded."),
    Metric("grpo_checkpoint_part_seconds", "gauge", "seconds", "Last save: stall, durable.", ("part",), BY_WAIT),
    Metric("grpo_checkpoint_failures_total", "counter", "saves", "Checkpoints that could not be written."),
    Metric("grpo_checkpoint_skipped_total", "counter", "checkpoints", "Damaged checkpoints that were passed over."),
    Metric("grpo_eval_score", "gauge", "", "Scores of the last evaluation.", ("metric",), BY_SCORE),
)


@lru_cache(maxsize=1024)
def lookup(key: str) -> tuple[Metric, str]:
    """The metric of a key and its label value ("" without a label). An unknown key is our own mistake."""
    for metric in CATALOGUE:
        for pattern, label in metric.keys.items():
            if fnmatchcase(key, pattern):
                return metric, label.replace("*", key[pattern.find("*") :])
    raise AssertionError(f"the key {key!r} has no metric; add it to CATALOGUE in grpo/observe/metrics.py")


def summarize(groups: Sequence[Group], step: int) -> Stats:
    """The keys that follow from a step's groups: of their lengths, and of their rewards where they are scored."""
    samples = [sample for group in groups for sample in group.samples]
    lengths_B = [sample.sampled_tokens for sample in samples]
    lengths = {
        "completion/tokens": fmean(lengths_B),
        "rollout/prompt_tokens": float(sum(len(group.prompt.token_ids) for group in groups)),
        "rollout/completion_tokens": float(sum(lengths_B)),
    }
    if not all(group.scored for group in groups):
        return lengths
    rewards_B = [reward for group in groups for reward in group.rewards_G]
    return lengths | {
        "reward/mean": fmean(rewards_B),
        "reward/std": pstdev(rewards_B),
        **_by_source(groups),
        "reward/zero_variance": fmean(group.zero_variance for group in groups),
        "completion/truncated": fmean(sample.truncated for sample in samples),
        "completion/overlong_penalty": fmean(sample.penalty for sample in samples),
        "rollout/staleness": fmean(sample.lag(step) for sample in samples),
        "rollout/staleness_max": float(max(sample.lag(step) for sample in samples)),
    }


def _by_source(groups: Sequence[Group]) -> Stats:
    """Mean rewards of the sources that have a name."""
    rewards: dict[str, list[float]] = {}
    for group in groups:
        if group.prompt.source:
            rewards.setdefault(group.prompt.source, []).extend(group.rewards_G)
    return {f"reward/source/{name}": fmean(found) for name, found in rewards.items() if found}


def digests(groups: Groups) -> dict[str, str]:
    """What tells whether two runs did the same in a step: digests of its prompts' ids and of its sampled tokens."""
    named = {
        "prompts": [group.prompt.id for group in groups],
        "tokens": [sample.output_ids for group in groups for sample in group.samples],
    }
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for name, value in named.items()}
