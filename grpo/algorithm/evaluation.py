"""Scores of held-out prompts: pass@1, pass@k, maj@k. A sample is right when its reward is at least 1.0."""

from collections.abc import Hashable, Mapping, Sequence
from math import comb
from statistics import fmean

from grpo.rewards.built_in import AnswerOf
from grpo.rewards.gsm8k import final_number
from grpo.types import Group, Sample, Stats

RIGHT = 1.0
"""Reward from which on a sample counts as right; with several rewards choose weights that give this to a right one."""


def score_evaluation(
    groups: Sequence[Group], answer_of: AnswerOf = final_number, by_source: Mapping[str, AnswerOf] | None = None
) -> Stats:
    """Mean scores over the P prompts. Empty for no groups.

    `eval/accuracy` is pass@1, the share of right samples; `eval/pass@k` for k = 2, 4, 8, … <= n; `eval/maj@n` if n > 1;
    `eval/reward` and `eval/completion_tokens` are means, `eval/truncated_ratio` is the share cut off at max_tokens.
    n is the number of samples of the largest group. A prompt that lost samples, as their reward failed, counts with
    those that are left, and for pass@k only if it has k. `answer_of` says how samples vote (`answers_of` of the run's
    rewards), `by_source` those of one source.
    """
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        return {}
    return {name: fmean(values_P) for name, values_P in by_prompt(groups, answer_of, by_source).items()} | {
        "eval/reward": fmean(reward for group in groups for reward in group.rewards_G),
        "eval/completion_tokens": fmean(sample.sampled_tokens for sample in samples),
        "eval/truncated_ratio": fmean(sample.truncated for sample in samples),
    }


def by_prompt(
    groups: Sequence[Group], answer_of: AnswerOf = final_number, by_source: Mapping[str, AnswerOf] | None = None
) -> dict[str, list[float]]:
    """Accuracy, pass@k and maj@k of each prompt; their means are the scores of that name."""
    groups = [group for group in groups if group.samples]
    right_and_size_P = [(sum(map(is_right, group.samples)), len(group.samples)) for group in groups]
    n = max(size for _, size in right_and_size_P)
    values = {"eval/accuracy": [right / size for right, size in right_and_size_P]}
    k = 2
    while k <= n:
        values[f"eval/pass@{k}"] = [pass_at_k(size, right, k) for right, size in right_and_size_P if size >= k]
        k *= 2
    if n > 1:
        votes = by_source or {}
        chosen = [majority(group.samples, votes.get(group.prompt.source, answer_of)) for group in groups]
        values[f"eval/maj@{n}"] = [float(is_right(sample)) for sample in chosen]
    return values


def overall(scores: Stats) -> float:
    """The one number by which checkpoints are compared, the higher the better: accuracy, or less loss in a warm-up."""
    return scores["eval/accuracy"] if "eval/accuracy" in scores else -scores["eval/loss"]


def is_right(sample: Sample) -> bool:
    """Whether its reward is that of a right answer."""
    return sample.reward is not None and sample.reward >= RIGHT


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without putting back, hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al., arXiv 2107.03374, eq. 1.
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(samples: Sequence[Sample], answer_of: AnswerOf = final_number) -> Sample:
    """The first sample that gives the answer which most samples give; the earliest answer wins a tie.

    Samples without an answer abstain. If no sample has one, their stripped texts vote.
    """
    votes: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        answer = answer_of(sample.text)
        if answer is not None:
            votes.setdefault(answer, []).append(sample)
    if not votes:
        for sample in samples:
            votes.setdefault(sample.text.strip(), []).append(sample)
    return max(votes.values(), key=len)[0]
