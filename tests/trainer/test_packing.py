import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.trainer.packing import RowTokens, pack, plan_minibatches, row_tokens
from grpo.types import Sample


def sample(prompt: tuple[int, ...], output: tuple[int, ...], advantage: float | None = 1.0) -> Sample:
    logprobs = tuple(-0.5 - token for token in output)
    return Sample("p", 0, prompt, output, logprobs, ((0, 0),), "stop", "", 1.0, advantage)


row_lengths = st.builds(lambda prompt, own: RowTokens(prompt, prompt + 1, own), st.integers(0, 8), st.integers(0, 30))
batches = st.lists(row_lengths, min_size=1, max_size=60)


def forwarded(rows: tuple[int, ...], batch: list[RowTokens]) -> int:
    """Tokens of a micro-batch: each prompt once."""
    prompts = {batch[row].prompt: batch[row].prompt_tokens for row in rows}
    return sum(prompts.values()) + sum(batch[row].own_tokens for row in rows)


@given(
    batch=batches, ranks=st.integers(1, 5), minibatches=st.integers(1, 6), budget=st.integers(40, 200), data=st.data()
)
def test_every_row_exactly_once_and_ranks_in_lockstep(batch, ranks, minibatches, budget, data):
    skip = data.draw(st.sets(st.sampled_from(range(len(batch)))))
    most = data.draw(st.sampled_from([math.inf, 40.0, 90.0]))
    parts = plan_minibatches(
        batch, ranks=ranks, minibatches=minibatches, token_budget=budget, seed="s", skip=skip, laid_out=most
    )
    assert sorted(row for part in parts for row in part.rows) == list(range(len(batch)))
    assert {len(part.rows) for part in parts} <= {len(batch) // minibatches, math.ceil(len(batch) / minibatches)}
    for part in parts:
        run = [row for micro_batches in part.micro_batches for rows in micro_batches for row in rows]
        assert sorted(run) == sorted(set(part.rows) - skip)
        assert len(part.micro_batches) == ranks
        assert len({len(micro_batches) for micro_batches in part.micro_batches}) == 1
        for micro_batches in part.micro_batches:
            assert all(forwarded(rows, batch) <= budget for rows in micro_batches)
            assert all(sum(sum(batch[row][1:]) for row in rows) <= most for rows in micro_batches)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), ranks=st.integers(1, 5))
def test_ranks_differ_by_one_row_at_most(lengths, ranks):
    batch = [RowTokens(row, length, 0) for row, length in enumerate(lengths)]
    (part,) = plan_minibatches(batch, ranks=ranks, minibatches=1, token_budget=2400, seed="s")
    tokens = [sum(lengths[row] for rows in mine for row in rows) for mine in part.micro_batches]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_rows_of_a_prompt_stay_together_unless_a_rank_would_idle():
    batch = [RowTokens(row % 8, 10, 5) for row in range(64)]
    (part,) = plan_minibatches(batch, ranks=2, minibatches=1, token_budget=1000, seed="s")
    assert [forwarded(rows, batch) for mine in part.micro_batches for rows in mine] == [4 * 10 + 32 * 5] * 2
    one_prompt = [RowTokens("p", 10, 5)] * 64
    (part,) = plan_minibatches(one_prompt, ranks=4, minibatches=1, token_budget=1000, seed="s")
    assert [len(mine[0]) for mine in part.micro_batches] == [16] * 4


def test_the_plan_depends_on_the_seed_only():
    batch = [RowTokens(row % 4, 3, row) for row in range(20)]
    arguments = {"ranks": 2, "minibatches": 2, "token_budget": 64}
    first = plan_minibatches(batch, **arguments, seed="7/step 1/epoch 0")
    assert first == plan_minibatches(batch, **arguments, seed="7/step 1/epoch 0")
    assert first != plan_minibatches(batch, **arguments, seed="7/step 1/epoch 1")


def test_a_small_plan_by_hand():
    batch = [RowTokens(row, 1, length - 1) for row, length in enumerate([5, 3, 9, 2])]
    (part,) = plan_minibatches(batch, ranks=2, minibatches=1, token_budget=9, seed="s")
    # longest first to the lighter rank: 9 | 5, 3, 2, and 2 does not fit behind 5 + 3
    assert part.micro_batches == (((2,), ()), ((0, 1), (3,)))


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="row 1 has 11 tokens, the budget is 10"):
        plan_minibatches(
            [RowTokens("a", 2, 1), RowTokens("b", 5, 6)], ranks=1, minibatches=1, token_budget=10, seed="s"
        )


def test_pack_by_hand():
    batch = pack([sample((7, 8), (1, 2, 3), 0.5), sample((9,), (4,), -2.0)])
    assert batch.input_ids_T.tolist() == [7, 8, 1, 2, 9]  # the last token of a row predicts nothing
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0]
    assert batch.cu_seqlens_R1.tolist() == [0, 4, 5]
    assert batch.max_length == 4
    assert batch.predict_C.tolist() == [1, 2, 3, 4]
    assert batch.targets_C.tolist() == [1, 2, 3, 4]
    assert batch.rows_C.tolist() == [0, 0, 0, 1]
    assert batch.trained_lengths_R.tolist() == [3, 1]
    assert batch.rollout_logprobs_C.tolist() == [-1.5, -2.5, -3.5, -4.5]
    assert batch.advantages_C.tolist() == [0.5, 0.5, 0.5, -2.0]
    assert batch.expand_E.tolist() == batch.select_T.tolist() == [0, 1, 2, 3, 4]
    assert batch.rows == 2


def test_a_mask_leaves_tokens_unscored_and_shortens_nothing_else():
    plain = sample((7, 8), (1, 2, 3, 4), 0.5)
    batch = pack([replace(plain, trained=(True, False, False, True)), sample((9,), (5,), -2.0)])
    whole = pack([plain, sample((9,), (5,), -2.0)])
    assert torch.equal(batch.input_ids_T, whole.input_ids_T) and torch.equal(batch.expand_E, whole.expand_E)
    assert batch.predict_C.tolist() == [1, 4, 5] and batch.targets_C.tolist() == [1, 4, 5]
    assert batch.rows_C.tolist() == [0, 0, 1] and batch.trained_lengths_R.tolist() == [2, 1]
    assert batch.rollout_logprobs_C.tolist() == [-1.5, -4.5, -5.5]
    assert batch.advantages_C.tolist() == [0.5, 0.5, -2.0]


def test_a_mask_of_all_is_no_mask():
    rows = [sample((7, 8), (1, 2, 3)), sample((7, 8), (4,))]
    masked = pack([replace(row, trained=(True,) * len(row.output_ids)) for row in rows])
    for field in fields(masked):
        left, right = getattr(masked, field.name), getattr(pack(rows), field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_pack_forwards_a_shared_prompt_once():
    batch = pack([sample((7, 8), (1, 2)), sample((9,), (3,)), sample((7, 8), (4, 5, 6)), sample((7, 8), (2,))])
    assert batch.input_ids_T.tolist() == [7, 8, 1, 9, 4, 5]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 2, 3]
    assert batch.expand_E.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1]
    assert batch.cu_seqlens_R1.tolist() == [0, 3, 4, 8, 10]
    assert batch.select_T.tolist() == [0, 1, 2, 3, 6, 7]
    assert batch.predict_C.tolist() == [1, 2, 3, 1, 4, 5, 1]
    assert batch.targets_C.tolist() == [1, 2, 3, 4, 5, 6, 2]
    assert batch.rows_C.tolist() == [0, 0, 1, 2, 2, 2, 3]


def test_an_empty_completion_has_no_tokens_but_counts_as_a_row():
    batch = pack([sample((7, 8), ()), sample((9,), (4,))])
    assert batch.rows == 2
    assert batch.input_ids_T.tolist() == [7, 8, 9]
    assert (batch.predict_C.tolist(), batch.rows_C.tolist()) == ([2], [1])
    assert row_tokens(sample((7, 8), ())) == row_tokens(sample((7, 8), (1,))) == ((7, 8), 2, 0)


def test_a_filler_has_one_token_and_no_rows():
    batch = pack([])
    assert (batch.rows, len(batch.input_ids_T), len(batch.targets_C)) == (0, 1, 1)
    assert batch.rollout_logprobs_C.isnan().all()


def test_masks_come_from_lengths_not_from_ids():
    zeros = pack([sample((0, 0), (0, 0))])
    assert len(zeros.targets_C) == 2


def test_samples_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="2 tokens and 1 logprobs"):
        pack([Sample("p", 0, (1,), (2, 3), (-1.0,), ((0, 0),), "stop", "", 1.0, 1.0)])
    with pytest.raises(ValueError, match="2 tokens and a mask of 3"):
        pack([replace(sample((1,), (2, 3)), trained=(True, True, False))])
    with pytest.raises(ValueError, match="prompt p is empty"):
        pack([sample((), (2,))])
    with pytest.raises(AssertionError, match="no advantage"):
        pack([sample((1,), (2,), None)])
