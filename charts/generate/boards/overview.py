"""Run overview: is it alive, how far is it, does it learn."""

from charts.generate.boards.learning import COMPLETIONS, LEARNING
from charts.generate.boards.off_policy import OFF_POLICY
from charts.generate.layout import Board
from charts.generate.panels import limits, lines, mean, number

MEAN_STEP = mean("grpo_step_duration_seconds", window="1h")
NOW = [
    number(
        "Step",
        "Last finished step of the run.",
        "prefix:#",
        {"{{run}}": "max by (run) (grpo_step{<run>})"},
    ),
    number(
        "Done",
        "Share of run.steps that is finished.",
        "percentunit",
        {"{{run}}": "max by (run) (grpo_step{<run>}) / max by (run) (grpo_run_steps{<run>})"},
        decimals=0,
    ),
    number(
        "Time left",
        "Steps that are left, times the mean duration of a step in the last hour. Empty before the first step.",
        "s",
        {"{{run}}": f"(max by (run) (grpo_run_steps{{<run>}}) - max by (run) (grpo_step{{<run>}})) * {MEAN_STEP}"},
        decimals=0,
    ),
    number(
        "Last sign of progress",
        "Time since a phase last began or ended. Red from the default of stepStalledSeconds on.",
        "s",
        {"{{run}}": "time() - max by (run) (grpo_progress_timestamp_seconds{<run>})"},
        steps=limits(300, 600),
        decimals=0,
        alerts=["GrpoStepStalled", "GrpoControllerDown"],
    ),
    number(
        "Phase",
        "What the controller is doing. Between two phases too: actors start or are replaced.",
        "string",
        {
            "{{phase}}": "max by (run, phase) (grpo_phase{<run>} == 1)",
            "between": "max by (run) (grpo_run_info{<run>}) unless on (run) max by (run) (grpo_phase{<run>} == 1)",
        },
        names=True,
        alerts=["GrpoStepStalled"],
    ),
    number(
        "Missing workers",
        "Engines and ranks that the configuration asks for and that are not ready.",
        "suffix:workers",
        {
            "{{role}}": 'max by (run, role) (grpo_workers{<run>,state="expected"})'
            ' - max by (run, role) (grpo_workers{<run>,state="ready"})'
        },
        steps=limits(1, 2),
        alerts=["GrpoRolloutWorkerLost", "GrpoTrainerWorkerLost"],
    ),
    number(
        "Steps at risk",
        "Finished steps that are in no checkpoint yet: what a crash would lose.",
        "suffix:steps",
        {"{{run}}": "max by (run) (grpo_step{<run>}) - max by (run) (grpo_checkpoint_step{<run>})"},
        alerts=["GrpoCheckpointStale", "GrpoCheckpointFailing"],
    ),
    number(
        "Alerts firing",
        "Alerts of this chart that fire for these runs.",
        "suffix:alerts",
        {"": 'count(ALERTS{<run>,alertname=~"Grpo.+",alertstate="firing"}) or vector(0)'},
        steps=limits(1, 1.5),
    ),
]
HEALTH = [
    lines(
        "Throughput",
        "Completion tokens of a step by its duration.",
        "count:tokens/s",
        {"{{run}}": "max by (run) (grpo_step_tokens_per_second{<run>})"},
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "Steps an hour",
        "Steps by outcome. A failed step is made again.",
        "suffix:steps/h",
        {"{{outcome}} {{run}}": "sum by (run, outcome) (rate(grpo_steps_total{<run>}[$__rate_interval])) * 3600"},
        low=0,
        alerts=["GrpoStepStalled"],
    ),
    lines(
        "Reward code",
        "Failed calls by kind, dropped samples and groups, requests to services; per minute. 0 with built-in rewards.",
        "suffix:per min",
        {
            "failed: {{kind}} {{run}}": "sum by (run, kind)"
            " (rate(grpo_reward_failures_total{<run>}[$__rate_interval])) * 60",
            "dropped samples {{run}}": "sum by (run)"
            " (rate(grpo_reward_dropped_samples_total{<run>}[$__rate_interval])) * 60",
            "dropped groups {{run}}": "sum by (run)"
            " (rate(grpo_reward_dropped_groups_total{<run>}[$__rate_interval])) * 60",
            "requests {{kind}} {{run}}": "sum by (run, kind)"
            " (rate(grpo_reward_requests_total{<run>}[$__rate_interval])) * 60",
        },
        low=0,
        alerts=["GrpoRewardFailures"],
    ),
    number(
        "Starts",
        "How often the run was started, this start included.",
        "suffix:starts",
        {"{{run}}": "max by (run) (grpo_attempt{<run>})"},
        alerts=["GrpoRetryBudgetLow"],
        width=4,
    ),
    number(
        "Resumed at step",
        "Step that this start, or the trainer after its last loss, resumed from.",
        "prefix:#",
        {"{{run}}": "max by (run) (grpo_resumed_step{<run>})"},
        width=4,
    ),
    number(
        "Last step",
        "When the last step finished.",
        "dateTimeFromNow",
        {"{{run}}": "max by (run) (grpo_last_step_timestamp_seconds{<run>}) * 1000"},
        alerts=["GrpoStepStalled"],
        width=4,
    ),
    number(
        "What is trained",
        "Model and loss of the run.",
        "string",
        {"{{model}}, {{loss}}": "max by (run, model, loss) (grpo_run_info{<run>})"},
        names=True,
        width=8,
    ),
    number(
        "Version",
        "Version of the program.",
        "string",
        {"{{version}}": "max by (run, version) (grpo_build_info{<run>})"},
        names=True,
        width=4,
    ),
]
BOARD = Board(
    "overview",
    "GRPO run",
    "Is the run alive, how far is it, and does it learn?",
    {"Now": NOW, "Learning": LEARNING, "Completions": COMPLETIONS, "Off policy": OFF_POLICY, "Health": HEALTH},
)
