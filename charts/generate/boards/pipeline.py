"""Pipeline: where the time of a step goes, and how weights, samples and checkpoints flow."""

from charts.generate.boards.flow import OVERLAP, SAMPLES, WEIGHTS
from charts.generate.layout import Board
from charts.generate.panels import limits, lines, mean, mean_and_p99, number, states


def idle(pool: str) -> str:
    """Share of the time of the last steps in which a pool had no work."""
    return f'max by (run) (avg_over_time(grpo_pool_idle_ratio{{<run>,pool="{pool}"}}[15m]))'


# The deadlines under the names of their phases
DEADLINES = """
max by (run, phase) (
  label_replace(
    label_replace(grpo_deadline_seconds{<run>}, "phase", "weight_sync", "phase", "sync"),
    "phase", "checkpoint", "phase", "save"
  )
)
"""
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
        "Share of the time in which the engines have no work; last 15 minutes.",
        "percentunit",
        {"{{run}}": idle("rollout")},
        decimals=0,
        alerts=["GrpoPoolIdle"],
        width=4,
    ),
    number(
        "Trainer idle",
        "Share of the time in which the trainer has no work; last 15 minutes.",
        "percentunit",
        {"{{run}}": idle("trainer")},
        decimals=0,
        alerts=["GrpoPoolIdle"],
        width=4,
    ),
    number(
        "Engines behind",
        "Weight versions that the engines are behind the trainer.",
        "suffix:versions",
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
        "suffix:syncs",
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
        "Share of the time in each phase and between them, stacked, over all runs; also of phases that are not over.",
        "percentunit",
        {
            "{{phase}}": "sum by (phase) (rate(grpo_phase_seconds_total{<run>}[$__rate_interval]))"
            " / scalar(sum(rate(grpo_phase_seconds_total{<run>}[$__rate_interval])))"
        },
        stack=True,
        low=0,
        high=1,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Duration of a phase",
        "Mean of each phase, on a logarithmic axis.",
        "s",
        {"{{phase}} {{run}}": mean("grpo_phase_duration_seconds", "run, phase")},
        log=True,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Deadline used",
        "Mean of each phase as a share of its deadline (deadlines.*); at 1 the run gives the phase up.",
        "percentunit",
        {"{{phase}} {{run}}": f"{mean('grpo_phase_duration_seconds', 'run, phase')} / on (run, phase) {DEADLINES}"},
        low=0,
        alerts=["GrpoStepStalled"],
    ),
    lines(
        "Duration of a step",
        "Mean and 99th percentile; the percentile is as fine as the buckets (1, 3, 10, 30, ...).",
        "s",
        mean_and_p99("grpo_step_duration_seconds"),
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Idle",
        "Share of the last step's time in which the devices of a pool had no work: the bubble.",
        "percentunit",
        {"{{pool}} {{run}}": "max by (run, pool) (grpo_pool_idle_ratio{<run>})"},
        low=0,
        high=1,
        alerts=["GrpoPoolIdle"],
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
    {"Now": NOW, "Time": TIME, "Overlap": OVERLAP, "Samples": SAMPLES, "Weights and checkpoints": WEIGHTS},
)
