import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.batching import pack, packed_length, plan
from grpo.types import Sample


def sample(prompt: tuple[int, ...], output: tuple[int, ...], advantage: float | None = 1.0) -> Sample:
    logprobs = tuple(-0.5 - token for token in output)
    return Sample("p", 0, prompt, output, logprobs, 0, "stop", "", 1.0, advantage)


batches = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(
    lengths=batches, ranks=st.integers(1, 5), minibatches=st.integers(1, 6), budget=st.integers(40, 200), data=st.data()
)
def test_every_row_exactly_once_and_ranks_in_lockstep(lengths, ranks, minibatches, budget, data):
    skip = data.draw(st.sets(st.sampled_from(range(len(lengths)))))
    parts = plan(lengths, ranks=ranks, minibatches=minibatches, token_budget=budget, seed="s", skip=skip)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(lengths)))
    assert {len(part.rows) for part in parts} <= {len(lengths) // minibatches, math.ceil(len(lengths) / minibatches)}
    for part in parts:
        run = [row for micro_batches in part.micro_batches for rows in micro_batches for row in rows]
        assert sorted(run) == sorted(set(part.rows) - skip)
        assert len(part.micro_batches) == ranks
        assert len({len(micro_batches) for micro_batches in part.micro_batches}) == 1
        for micro_batches in part.micro_batches:
            assert all(sum(lengths[row] for row in rows) <= budget for rows in micro_batches)


@given(lengths=batches, ranks=st.integers(1, 5))
def test_ranks_differ_by_one_row_at_most(lengths, ranks):
    (part,) = plan(lengths, ranks=ranks, minibatches=1, token_budget=2400, seed="s")
    tokens = [sum(lengths[row] for rows in mine for row in rows) for mine in part.micro_batches]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_the_plan_depends_on_the_seed_only():
    arguments = {"ranks": 2, "minibatches": 2, "token_budget": 64}
    first = plan(range(1, 20), **arguments, seed="7/step 1/epoch 0")
    assert first == plan(range(1, 20), **arguments, seed="7/step 1/epoch 0")
    assert first != plan(range(1, 20), **arguments, seed="7/step 1/epoch 1")


def test_a_small_plan_by_hand():
    (part,) = plan([5, 3, 9, 2], ranks=2, minibatches=1, token_budget=9, seed="s")
    # longest first to the lighter rank: 9 | 5, 3, 2, and 2 does not fit behind 5 + 3
    assert part.micro_batches == (((2,), ()), ((0, 1), (3,)))


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="row 1 has 11 tokens, the budget is 10"):
        plan([3, 11], ranks=1, minibatches=1, token_budget=10, seed="s")


def test_pack_by_hand():
    batch = pack([sample((7, 8), (1, 2, 3), 0.5), sample((9,), (4,), -2.0)])
    assert batch.input_ids_T.tolist() == [7, 8, 1, 2, 9]  # the last token of a row predicts nothing
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0]
    assert batch.cu_seqlens_R1.tolist() == [0, 4, 5]
    assert batch.max_length == 4
    assert batch.predict_C.tolist() == [1, 2, 3, 4]
    assert batch.targets_C.tolist() == [1, 2, 3, 4]
    assert batch.rows_C.tolist() == [0, 0, 0, 1]
    assert batch.completion_lengths_R.tolist() == [3, 1]
    assert batch.rollout_logprobs_C.tolist() == [-1.5, -2.5, -3.5, -4.5]
    assert batch.advantages_C.tolist() == [0.5, 0.5, 0.5, -2.0]
    assert batch.rows == 2


def test_an_empty_completion_has_no_tokens_but_counts_as_a_row():
    batch = pack([sample((7, 8), ()), sample((9,), (4,))])
    assert batch.rows == 2
    assert batch.input_ids_T.tolist() == [7, 9]
    assert batch.rows_C.tolist() == [1]
    assert packed_length(sample((7, 8), ())) == 1


def test_a_filler_has_one_token_and_no_rows():
    batch = pack([])
    assert (batch.rows, len(batch.input_ids_T), len(batch.targets_C)) == (0, 1, 1)
    assert batch.rollout_logprobs_C.isnan().all()


def test_masks_come_from_lengths_not_from_ids():
    zeros = pack([sample((0, 0), (0, 0))])
    assert len(zeros.targets_C) == 2


def test_samples_that_cannot_be_trained_on():
    with pytest.raises(ValueError, match="2 tokens and 1 logprobs"):
        pack([Sample("p", 0, (1,), (2, 3), (-1.0,), 0, "stop", "", 1.0, 1.0)])
    with pytest.raises(ValueError, match="prompt p is empty"):
        pack([sample((), (2,))])
    with pytest.raises(AssertionError, match="no advantage"):
        pack([sample((1,), (2,), None)])
