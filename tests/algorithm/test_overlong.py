"""Penalties for length, and masked completions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.advantages import advantages
from grpo.algorithm.overlong import masked, overlong_penalty, penalised
from grpo.config import Algorithm, Config
from grpo.observe.metrics import summarize
from grpo.types import Group, Prompt, Sample


def configured(**algorithm: object) -> Config:
    return Config.model_validate(
        {"model": {"path": "m"}, "rollout": {"max_tokens": 8, "samples_per_prompt": 4}, "algorithm": algorithm}
    )


def group(*lengths: int, rewards: tuple[float, ...] = ()) -> Group:
    prompt = Prompt("p", "q", "a", (1,))
    samples = [
        Sample("p", i, (1,), (2,) * n, (0.0,) * n, ((0, 0),), "length" if n == 8 else "stop", "t", reward)
        for i, (n, reward) in enumerate(zip(lengths, rewards or (1.0,) * len(lengths), strict=True))
    ]
    return Group(prompt, tuple(samples))


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0), (20481, -1.0)])
def test_the_values_of_dapo(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, max_tokens=20480, buffer=4096) == penalty


@given(st.integers(1, 10_000), st.integers(1, 100), st.integers(1, 100))
def test_it_is_as_in_the_paper(tokens: int, buffer: int, more: int) -> None:
    longest = buffer + more
    expected = (
        0.0 if tokens <= longest - buffer else (longest - buffer - tokens) / buffer if tokens <= longest else -1.0
    )
    assert overlong_penalty(tokens, longest, buffer) == pytest.approx(expected, abs=1e-15)


def test_penalties_count_in_the_advantage_and_not_in_the_reward() -> None:
    [scored] = penalised([group(4, 6, 8, 8, rewards=(1, 1, 1, 0))], configured(overlong={"buffer": 4, "penalty": 0.5}))
    assert [sample.penalty for sample in scored.samples] == [0.0, -0.25, -0.5, -0.5]
    assert scored.rewards_G == [1, 1, 1, 0] and scored.penalised_G == [1, 0.75, 0.5, -0.5]
    samples = advantages([scored], Algorithm(advantage_std="none"))
    assert [sample.advantage for sample in samples] == pytest.approx([0.5625, 0.3125, 0.0625, -0.9375])
    stats = summarize([scored], step=1)
    assert stats["reward/mean"] == 0.75 and stats["completion/overlong_penalty"] == -0.3125
    same = group(6, 8)
    assert same.zero_variance and not penalised([same], configured(overlong={"buffer": 4}))[0].zero_variance
    assert penalised([same], configured()) == [same]


def test_masked_completions_count_in_their_group_and_train_nothing() -> None:
    whole, cut = Algorithm(advantage_std="none"), Algorithm(mask_truncated=True)
    groups = [group(4, 8, 6, 8, rewards=(1, 0, 0, 1))]
    samples = masked(advantages(groups, whole), groups, cut)
    assert [sample.advantage for sample in samples] == [0.5, -0.5, -0.5, 0.5]
    assert [sample.trained_tokens for sample in samples] == [4, 0, 6, 0]
    assert [list(sample.trained_places) for sample in samples][1:3] == [[], [0, 1, 2, 3, 4, 5]]
    assert [sample.sampled_tokens for sample in samples] == [4, 8, 6, 8]
    assert summarize([Group(Prompt("p", "q", "a", (1,)), tuple(samples))], 1)["completion/tokens"] == 6.5
    one = [group(4)]
    assert masked(advantages(one, whole), one, cut) == advantages(one, whole)
    assert masked(advantages(groups, whole), groups, whole) == advantages(groups, whole)


def test_groups_of_equal_rewards_are_left_out_where_that_is_asked() -> None:
    drop = Algorithm(drop_zero_variance=True)
    groups = [group(4, 5, rewards=(1, 1)), group(6, 8, rewards=(1, 0))]
    assert [sample.masked for sample in masked(advantages(groups, drop), groups, drop)] == [True, True, False, False]
    assert not any(sample.masked for sample in masked(advantages(groups, Algorithm()), groups, Algorithm()))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm.overlong.buffer = 9 must be at most rollout.max_tokens = 8"):
        configured(overlong={"buffer": 9})
    with pytest.raises(ValueError, match=r"rollout.top_k = 5 the sampler's leaves tokens out"):
        Config.model_validate({"model": {"path": "m"}, "rollout": {"top_k": 5}})
