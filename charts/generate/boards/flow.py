"""The rows of the pipeline dashboard about samples, their overlap with training, weights and checkpoints."""

from charts.generate.panels import heat, lines, mean_and_p99

SAMPLES = [
    lines(
        "Tokens sampled",
        "Tokens per second, averaged over whole steps; each prompt counts once.",
        "count:tokens/s",
        {"{{kind}} {{run}}": "sum by (run, kind) (rate(grpo_rollout_tokens_total{<run>}[$__rate_interval]))"},
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Tokens trained",
        "Tokens per second that went through the trainer, prompts included.",
        "count:tokens/s",
        {"{{run}}": "sum by (run) (rate(grpo_train_tokens_total{<run>}[$__rate_interval]))"},
        low=0,
    ),
    lines(
        "Updates",
        "Optimizer updates per minute, and those skipped because they were not finite.",
        "suffix:updates/min",
        {
            "made {{run}}": "sum by (run) (rate(grpo_train_updates_total{<run>}[$__rate_interval])) * 60",
            "skipped {{run}}": "sum by (run) (rate(grpo_train_skipped_updates_total{<run>}[$__rate_interval])) * 60",
            "NaN logprobs {{run}}": "sum by (run) (rate(grpo_unknown_logprobs_total{<run>}[$__rate_interval])) * 60",
        },
        low=0,
        alerts=["GrpoNonFinite"],
    ),
    heat(
        "Staleness",
        "Weight versions between the trainer and the samples that it learns from. All in the lowest row: on policy.",
        "suffix:versions",
        "sum by (le) (increase(grpo_sample_staleness_steps_bucket{<run>}[$__rate_interval]))",
        alerts=["GrpoStaleness"],
    ),
    lines(
        "Sampler and trainer",
        "How far vLLM and the trainer differ about the same tokens, in nats: mean difference, and at the self-test.",
        "suffix:nats",
        {
            "difference {{run}}": "max by (run) (grpo_rollout_train_abs_diff{<run>})",
            "self-test {{run}}": "max by (run) (grpo_self_test_diff_nats{<run>})",
        },
        low=0,
        alerts=["GrpoSamplerMismatch"],
    ),
]
OVERLAP = [
    lines(
        "Lag",
        "Weight versions that the last step's samples are behind it, and the bound (rollout.max_staleness).",
        "suffix:versions",
        {
            "mean {{run}}": "max by (run) (grpo_sample_staleness_mean_steps{<run>})",
            "largest {{run}}": "max by (run) (grpo_sample_staleness_max_steps{<run>})",
            "bound {{run}}": "max by (run) (grpo_max_staleness_steps{<run>})",
        },
        low=0,
        alerts=["GrpoStaleness", "GrpoLagAtBound"],
    ),
    lines(
        "Batches ahead",
        "Batches that are ready when a step begins. Always 0: the trainer waits; always the bound: the engines.",
        "suffix:batches",
        {"{{run}}": "max by (run) (grpo_batches_ahead{<run>})"},
        low=0,
        alerts=["GrpoPoolIdle", "GrpoLagAtBound"],
    ),
    lines(
        "Parts of a sync",
        "The trainer stands still to publish, the engines to switch; they receive beside sampling.",
        "s",
        {"{{part}} {{run}}": "max by (run, part) (grpo_weight_sync_part_seconds{<run>})"},
        log=True,
        alerts=["GrpoWeightSyncSlow"],
    ),
    lines(
        "Published versions",
        "Bytes of the copies that the trainer keeps, at most rollout.max_staleness + 1.",
        "bytes",
        {"{{run}}": "max by (run) (grpo_weight_snapshot_bytes{<run>})"},
        low=0,
    ),
    lines(
        "Parts of a checkpoint",
        "The trainer stalls for a copy of its state; until it is durable the next steps are made.",
        "s",
        {"{{part}} {{run}}": "max by (run, part) (grpo_checkpoint_part_seconds{<run>})"},
        log=True,
        alerts=["GrpoCheckpointStale"],
    ),
]
WEIGHTS = [
    lines(
        "Weight sync",
        "Mean and 99th percentile of a sync.",
        "s",
        mean_and_p99("grpo_weight_sync_duration_seconds"),
        low=0,
        alerts=["GrpoWeightSyncSlow"],
    ),
    lines(
        "Bytes of a sync",
        "Bytes sent by syncs, per second; divided by the time of a sync it is what the network carries.",
        "Bps",
        {
            "mean {{run}}": "sum by (run) (rate(grpo_weight_sync_bytes_total{<run>}[$__rate_interval]))",
            "while syncing {{run}}": "sum by (run) (rate(grpo_weight_sync_bytes_total{<run>}[$__rate_interval])) /"
            " (sum by (run) (rate(grpo_weight_sync_duration_seconds_sum{<run>}[$__rate_interval])) > 0)",
        },
        low=0,
        log=True,
        alerts=["GrpoWeightSyncSlow"],
    ),
    lines(
        "Policy version",
        "Step whose weights each role holds. The lines lie on each other but for the time of a step.",
        "prefix:#",
        {"{{role}} {{run}}": "max by (run, role) (grpo_policy_version{<run>})"},
        low=0,
        alerts=["GrpoPolicyVersionSkew"],
    ),
    lines(
        "Syncs",
        "Weight syncs per hour by result.",
        "suffix:syncs/h",
        {"{{result}} {{run}}": "sum by (run, result) (rate(grpo_weight_sync_total{<run>}[$__rate_interval])) * 3600"},
        low=0,
        alerts=["GrpoWeightSyncFailing"],
    ),
    lines(
        "Checkpoints",
        "Finished step and newest checkpoint. Their distance should not exceed checkpoint.every.",
        "suffix:steps",
        {
            "step {{run}}": "max by (run) (grpo_step{<run>})",
            "checkpoint {{run}}": "max by (run) (grpo_checkpoint_step{<run>})",
            "every {{run}}": "max by (run) (grpo_checkpoint_every_steps{<run>})",
        },
        low=0,
        alerts=["GrpoCheckpointStale"],
    ),
    lines(
        "Records in trouble",
        "Saves that failed, damaged checkpoints passed over, calls of a tracker that failed, since the start.",
        "suffix:times",
        {
            "failed {{run}}": "sum by (run) (grpo_checkpoint_failures_total{<run>})",
            "damaged {{run}}": "sum by (run) (grpo_checkpoint_skipped_total{<run>})",
            "{{tracker}} {{run}}": "sum by (run, tracker) (grpo_tracker_failures_total{<run>})",
        },
        low=0,
        alerts=["GrpoCheckpointFailing"],
    ),
    lines(
        "Size of a checkpoint",
        "Bytes of the last checkpoint that was saved.",
        "bytes",
        {"{{run}}": "max by (run) (grpo_checkpoint_size_bytes{<run>})"},
        low=0,
        alerts=["GrpoVolumeFilling"],
    ),
]
