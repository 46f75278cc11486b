"""The rows of the run overview about samples that the trainer's own weights did not make, and their correction."""

from charts.generate.panels import heat, lines

_OF = "{{of}} {{run}}"

OFF_POLICY = [
    lines(
        "Sampler against trainer",
        "Before a step's first update, in nats: mean log(sampler / trainer), 99th percentile and maximum of its size.",
        "suffix:nats",
        {
            "mean {{run}}": "max by (run) (grpo_rollout_train_log_ratio_mean{<run>})",
            "{{stat}} {{run}}": "max by (run, stat) (grpo_rollout_train_abs_diff_high{<run>})",
        },
        alerts=["GrpoSamplerMismatch"],
    ),
    lines(
        "Outlying tokens",
        "Shares of tokens: far off, and with a weight above the correction's upper bound or below one by it; and the "
        "largest difference of two probabilities.",
        "percentunit",
        {
            "far {{run}}": "max by (run) (grpo_rollout_train_far_ratio{<run>})",
            "weight {{side}} {{run}}": "max by (run, side) (grpo_correction_weight_outlying_ratio{<run>})",
            "probability {{run}}": "max by (run) (grpo_rollout_train_prob_diff_max{<run>})",
        },
        low=0,
        high=1,
        alerts=["GrpoSamplerMismatch"],
    ),
    lines(
        "Weight of a token",
        "w = trainer / sampler before a correction bounds it, and the ratio of perplexities. All near 1: on policy.",
        "suffix:×",
        {
            "{{stat}} {{run}}": "max by (run, stat) (grpo_correction_weight{<run>})",
            "perplexity {{run}}": "max by (run) (grpo_rollout_train_perplexity_ratio{<run>})",
        },
        low=0,
    ),
    heat(
        "Weights",
        "How many tokens have which weight w = trainer / sampler.",
        "suffix:×",
        "sum by (le) (label_replace(increase(grpo_correction_weights_total{<run>}[$__rate_interval]),"
        ' "le", "$1", "up_to", "(.+)"))',
    ),
    lines(
        "Effective samples",
        "Share of tokens or sequences that so unequal weights are worth, and what a correction drops.",
        "percentunit",
        {
            "worth " + _OF: "max by (run, of) (grpo_effective_sample_ratio{<run>})",
            "dropped " + _OF: "max by (run, of) (grpo_correction_dropped_ratio{<run>})",
        },
        low=0,
        high=1,
    ),
    lines(
        "Chi-square",
        "Mean of w squared less 1, by tokens and by sequences: the variance that the weights add.",
        "short",
        {_OF: "max by (run, of) (grpo_chi_square{<run>})"},
        low=0,
    ),
]
