"""Pipeline: where the time of a step goes, and how weights, samples and checkpoints flow."""

from charts.generate.boards.flow import SAMPLES, WEIGHTS
from charts.generate.layout import Board
from charts.generate.panels import limits, lines, mean, number, quantile, states

BUSY = 'sum by (run) (rate(grpo_phase_duration_seconds_sum{<run>,phase=~"%s"}[$__rate_interval]))'
NOW = [
    number(
        "Step takes",
        "Mean duration of a step in the last hour.",
        "s",
        {"{{run}}": mean("grpo_step_duration_seconds", window="1h")},
        alerts=["GrpoStepStalled", "GrpoThroughputDrop"],
        width=4,
    ),
    number(
        "Engines idle",
        "Share of the last 15 minutes in which no rollout or evaluation was under way.",
        "percentunit",
        {"{{run}}": f"clamp_min(1 - {BUSY % 'rollout|eval'}, 0)".replace("$__rate_interval", "15m")},
        decimals=0,
        width=4,
    ),
    number(
        "Trainer idle",
        "Share of the last 15 minutes in which the trainer did not train.",
        "percentunit",
        {"{{run}}": f"clamp_min(1 - {BUSY % 'train'}, 0)".replace("$__rate_interval", "15m")},
        decimals=0,
        width=4,
    ),
    number(
        "Engines behind",
        "Weight versions that the engines are behind the trainer.",
        "none",
        {
            "{{run}}": 'max by (run) (grpo_policy_version{<run>,role="trainer"})'
            ' - max by (run) (grpo_policy_version{<run>,role="rollout"})'
        },
        steps=limits(2, 4),
        alerts=["GrpoPolicyVersionSkew"],
        width=4,
    ),
    number(
        "Failed syncs",
        "Weight syncs that failed since the start of the controller.",
        "none",
        {"{{run}}": 'sum by (run) (grpo_weight_sync_total{<run>,result="error"})'},
        steps=limits(1, 2),
        alerts=["GrpoWeightSyncFailing"],
        width=4,
    ),
    number(
        "Checkpoint is",
        "Time since a checkpoint was last written.",
        "s",
        {"{{run}}": "time() - max by (run) (grpo_checkpoint_last_success_timestamp_seconds{<run>})"},
        decimals=0,
        alerts=["GrpoCheckpointStale"],
        width=4,
    ),
]
TIME = [
    states(
        "Phases",
        "The phase that is running, by run. A long band of one phase, or no band at all, is where to look.",
        {"{{phase}} {{run}}": "max by (run, phase) (grpo_phase{<run>})"},
        alerts=["GrpoStepStalled"],
    ),
    lines(
        "Where the time goes",
        "Share of the time in each phase, stacked, mean over the runs. What lacks to 1 is idle.",
        "percentunit",
        {
            "{{phase}}": "sum by (phase) (rate(grpo_phase_duration_seconds_sum{<run>}[$__rate_interval]))"
            " / scalar(count(max by (run) (grpo_run_info{<run>})))"
        },
        stack=True,
        low=0,
        high=1,
        width=12,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Duration of a phase",
        "Mean of each phase on a logarithmic axis, and the deadlines (deadlines.*).",
        "s",
        {
            "{{phase}} {{run}}": mean("grpo_phase_duration_seconds", "run, phase"),
            "limit {{phase}}": 'max by (phase) (grpo_deadline_seconds{<run>,phase=~"rollout|reward|train|sync|save"})',
        },
        log=True,
        width=12,
        alerts=["GrpoStepStalled"],
    ),
    lines(
        "Duration of a step",
        "Mean and 99th percentile; the percentile is as fine as the buckets (1, 3, 10, 30, ...).",
        "s",
        {
            "mean {{run}}": mean("grpo_step_duration_seconds"),
            "p99 {{run}}": quantile(0.99, "grpo_step_duration_seconds"),
        },
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Idle",
        "Share of the time in which the engines sample nothing and the trainer trains nothing: the bubble.",
        "percentunit",
        {
            "engines {{run}}": f"clamp_min(1 - {BUSY % 'rollout|eval'}, 0)",
            "trainer {{run}}": f"clamp_min(1 - {BUSY % 'train'}, 0)",
        },
        low=0,
        high=1,
    ),
    lines(
        "Parts of training",
        "Seconds of the last step by part of the trainer's work.",
        "s",
        {"{{part}} {{run}}": "max by (run, part) (grpo_train_part_seconds{<run>})"},
        stack=True,
        low=0,
    ),
]
BOARD = Board(
    "pipeline",
    "GRPO pipeline",
    "Where does the time of a step go, and do weights, samples and checkpoints flow?",
    {"Now": NOW, "Time": TIME, "Samples": SAMPLES, "Weights and checkpoints": WEIGHTS},
)
