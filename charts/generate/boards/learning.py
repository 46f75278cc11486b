"""The rows of the run overview about what the policy learns and writes."""

from charts.generate.panels import heat, lines

LEARNING = [
    lines(
        "Reward",
        "Mean reward of each step's samples, with one standard deviation above and below. It should rise.",
        "suffix:points",
        {
            "mean {{run}}": "max by (run) (grpo_reward_mean{<run>})",
            "mean + σ {{run}}": "max by (run) (grpo_reward_mean{<run>} + grpo_reward_stddev{<run>})",
            "mean - σ {{run}}": "max by (run) (grpo_reward_mean{<run>} - grpo_reward_stddev{<run>})",
            "evaluation {{run}}": 'max by (run) (grpo_eval_score{<run>,metric="reward"})',
        },
        alerts=["GrpoRewardCollapse"],
    ),
    lines(
        "Reward by part",
        "Mean of each reward function before its weight, over all that was scored in a step, and of each named source.",
        "suffix:points",
        {
            "{{function}} {{run}}": "max by (run, function) (grpo_reward_mean_by_function{<run>})",
            "source {{source}} {{run}}": "max by (run, source) (grpo_reward_mean_by_source{<run>})",
        },
        alerts=["GrpoRewardCollapse"],
    ),
    lines(
        "Evaluation",
        "Scores of the last evaluation on held-out prompts that are shares: accuracy, pass@k, maj@k, cut completions.",
        "percentunit",
        {"{{metric}} {{run}}": 'max by (run, metric) (grpo_eval_score{<run>,metric!~"completion_tokens|reward"})'},
        low=0,
        high=1,
    ),
    lines(
        "KL",
        "Nats per token: of each update, from the reference (with algorithm.kl_coef), and between sampler and trainer.",
        "suffix:nats/token",
        {
            "update {{run}}": "max by (run) (grpo_update_kl{<run>})",
            "reference {{run}}": "max by (run) (grpo_policy_kl{<run>})",
            "coefficient of that {{run}}": "max by (run) (grpo_policy_kl_coef{<run>})",
            "sampler - trainer {{run}}": "max by (run) (grpo_rollout_train_kl{<run>})",
        },
        alerts=["GrpoKlSpike", "GrpoSamplerMismatch"],
    ),
    lines(
        "Entropy",
        "Mean entropy of the policy, in nats per token. Near 0 it has stopped to explore.",
        "suffix:nats/token",
        {"{{run}}": "max by (run) (grpo_entropy_nats{<run>})"},
        low=0,
        alerts=["GrpoRewardCollapse"],
    ),
    lines(
        "Groups without signal",
        "Share of the trained groups whose rewards are all equal; they teach nothing. With rollout.refill also the "
        "share of the sampled ones that others replaced.",
        "percentunit",
        {
            "{{run}}": "max by (run) (grpo_group_zero_variance_ratio{<run>})",
            "replaced {{run}}": "max by (run) (grpo_skipped_groups_ratio{<run>})",
        },
        low=0,
        high=1,
        alerts=["GrpoNoLearningSignal"],
    ),
    lines(
        "Prompts that teach",
        "Share of the sampled groups with an advantage, and of the prompts whose turn data.curriculum skipped, as they "
        "were always (easy) or never right (hard).",
        "percentunit",
        {
            "with an advantage {{run}}": "max by (run) (grpo_effective_groups_ratio{<run>})",
            "skipped: {{difficulty}} {{run}}": "max by (run, difficulty) (grpo_curriculum_skipped_ratio{<run>})",
        },
        low=0,
        high=1,
        alerts=["GrpoNoLearningSignal"],
    ),
    lines(
        "Loss",
        "Mean loss of the step's updates. In GRPO it stays near 0; only jumps and gaps (NaN) say something.",
        "short",
        {"{{run}}": "max by (run) (grpo_loss{<run>})"},
        alerts=["GrpoNonFinite"],
    ),
    lines(
        "Gradient norm",
        "Before clipping to train.max_grad_norm.",
        "short",
        {"{{run}}": "max by (run) (grpo_grad_norm{<run>})"},
        low=0,
        alerts=["GrpoNonFinite"],
    ),
    lines(
        "Clipped tokens",
        "Share of tokens whose ratio left 1 - clip_low to 1 + clip_high.",
        "percentunit",
        {"{{bound}} {{run}}": "max by (run, bound) (grpo_clip_ratio{<run>})"},
        low=0,
        alerts=["GrpoKlSpike"],
    ),
    lines(
        "Largest importance weight",
        "Largest ratio of a token, new policy by sampler, in the last step.",
        "suffix:×",
        {"{{run}}": "max by (run) (grpo_importance_weight_max{<run>})"},
        alerts=["GrpoKlSpike"],
    ),
    lines(
        "Learning rate",
        "Of the last update.",
        "sci",
        {"{{run}}": "max by (run) (grpo_learning_rate{<run>})"},
        low=0,
    ),
    heat(
        "Rewards",
        "Distribution of the samples' rewards.",
        "suffix:points",
        "sum by (le) (increase(grpo_reward_bucket{<run>}[$__rate_interval]))",
        alerts=["GrpoRewardCollapse"],
    ),
]
COMPLETIONS = [
    lines(
        "Completion length",
        "Mean tokens of a completion, in training and in the last evaluation.",
        "count:tokens",
        {
            "training {{run}}": "max by (run) (grpo_completion_tokens_mean{<run>})",
            "evaluation {{run}}": 'max by (run) (grpo_eval_score{<run>,metric="completion_tokens"})',
        },
        low=0,
        alerts=["GrpoTruncation"],
    ),
    lines(
        "Cut completions",
        "Share of completions that end at rollout.max_tokens: last step, and all; mean penalty for length.",
        "percentunit",
        {
            "last step {{run}}": "max by (run) (grpo_completion_truncated_ratio{<run>})",
            "all {{run}}": "sum by (run) (grpo_completion_truncated_total{<run>})"
            " / (sum by (run) (grpo_completion_tokens_count{<run>}) > 0)",
            "mean penalty {{run}}": "-max by (run) (grpo_overlong_penalty_mean{<run>})",
        },
        low=0,
        alerts=["GrpoTruncation"],
    ),
    heat(
        "Lengths",
        "Distribution of the completions' lengths in tokens.",
        "count:tokens",
        "sum by (le) (increase(grpo_completion_tokens_bucket{<run>}[$__rate_interval]))",
        alerts=["GrpoTruncation"],
    ),
]
