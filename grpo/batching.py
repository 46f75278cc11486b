"""Samples to packed micro-batches: which rows go where (`plan`), and how they look to the model (`pack`).

Everything here is a pure function of its arguments. Every rank computes the whole plan by itself and finds the same
one, so nothing is sent between ranks to agree on it. Masks come from lengths, never from pad or end-of-text ids.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from grpo.types import Sample

Rows = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Minibatch:
    """One optimizer update. `rows` are all its rows, also the skipped ones: they count in the loss's normaliser.

    `micro_batches[rank]` is what each rank runs, as many as every other rank; an empty one is run as filler, because
    ZeRO's collectives need all ranks.
    """

    rows: Rows
    micro_batches: tuple[tuple[Rows, ...], ...]


def plan(
    lengths_B: Sequence[int],
    *,
    ranks: int,
    minibatches: int,
    token_budget: int,
    seed: str,
    skip: Collection[int] = (),
) -> tuple[Minibatch, ...]:
    """One pass over the batch: every row is in exactly one minibatch and, unless skipped, in one of its micro-batches.

    `lengths_B` and `token_budget` (of a micro-batch) are in tokens. `seed` names the shuffle: "7/step 3/epoch 0".
    Rows are dealt longest first to the rank with the fewest tokens. Raises ValueError if a row exceeds the budget.
    """
    for row, length in enumerate(lengths_B):
        if length > token_budget:
            raise ValueError(
                f"a row must fit a micro-batch: row {row} has {length} tokens, the budget is {token_budget}; "
                "raise train.tokens_per_micro_batch"
            )
    order = list(range(len(lengths_B)))
    random.Random(seed).shuffle(order)
    bounds = [len(order) * part // minibatches for part in range(minibatches + 1)]
    parts = [order[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    skipped = frozenset(skip)
    return tuple(
        Minibatch(
            rows=tuple(part),
            micro_batches=_micro_batches([r for r in part if r not in skipped], lengths_B, ranks, token_budget),
        )
        for part in parts
    )


def _micro_batches(
    rows: Sequence[int], lengths_B: Sequence[int], ranks: int, token_budget: int
) -> tuple[tuple[Rows, ...], ...]:
    """Deals rows to ranks, packs each rank's rows, and evens the numbers of micro-batches with empty ones."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda row: (-lengths_B[row], row)):
        rank = tokens.index(min(tokens))
        dealt[rank].append(row)
        tokens[rank] += lengths_B[row]
    packed = [_fill(mine, lengths_B, token_budget) for mine in dealt]
    count = max(len(micro_batches) for micro_batches in packed)
    return tuple(tuple(micro_batches + [()] * (count - len(micro_batches))) for micro_batches in packed)


def _fill(rows: Sequence[int], lengths_B: Sequence[int], token_budget: int) -> list[Rows]:
    """Fills one micro-batch after the other. Rows come longest first: neighbours are alike, attention pads little."""
    micro_batches: list[list[int]] = []
    room = 0
    for row in rows:
        if not micro_batches or lengths_B[row] > room:
            micro_batches.append([])
            room = token_budget
        micro_batches[-1].append(row)
        room -= lengths_B[row]
    return [tuple(micro_batch) for micro_batch in micro_batches]


def packed_length(sample: Sample) -> int:
    """Tokens that a forward pass sees of a sample: all but the last one, which predicts nothing."""
    return len(sample.prompt_ids) + len(sample.output_ids) - 1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """R rows behind each other, without padding. T forwarded tokens, C completion tokens.

    `cu_seqlens_R1` are the R + 1 bounds of the rows in T, `predict_C` the positions in T whose next token is a
    completion token, `targets_C` that token, `rows_C` its row. A filler (`rows` = 0) is one token that counts nowhere.
    """

    rows: int
    max_length: int
    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens_R1: torch.Tensor
    predict_C: torch.Tensor
    targets_C: torch.Tensor
    rows_C: torch.Tensor
    completion_lengths_R: torch.Tensor
    rollout_logprobs_C: torch.Tensor
    advantages_C: torch.Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Packs samples that have advantages; none give a filler. Raises ValueError if ids or logprobs are missing."""
    inputs: list[int] = []
    positions: list[int] = []
    bounds = [0]
    predict: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    rollout_logprobs: list[float] = []
    advantages: list[float] = []
    for row, sample in enumerate(samples):
        _check(sample)
        start, prompt, outputs = len(inputs), len(sample.prompt_ids), len(sample.output_ids)
        length = packed_length(sample)
        inputs += (sample.prompt_ids + sample.output_ids)[:length]
        positions += range(length)
        bounds.append(start + length)
        predict += range(start + prompt - 1, start + length)
        targets += sample.output_ids
        rows += [row] * outputs
        rollout_logprobs += sample.logprobs
        advantages += [_advantage(sample)] * outputs
    if not samples:
        inputs, positions, bounds, predict, targets, rows = [0], [0], [0, 1], [0], [0], [0]
        rollout_logprobs, advantages = [float("nan")], [0.0]
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    return PackedBatch(
        rows=len(samples),
        max_length=max(lengths),
        input_ids_T=torch.tensor(inputs),
        position_ids_T=torch.tensor(positions),
        cu_seqlens_R1=torch.tensor(bounds, dtype=torch.int32),
        predict_C=torch.tensor(predict, dtype=torch.int64),
        targets_C=torch.tensor(targets, dtype=torch.int64),
        rows_C=torch.tensor(rows, dtype=torch.int64),
        completion_lengths_R=torch.tensor([len(sample.output_ids) for sample in samples] or [1]),
        rollout_logprobs_C=torch.tensor(rollout_logprobs, dtype=torch.float32),
        advantages_C=torch.tensor(advantages, dtype=torch.float32),
    )


def _check(sample: Sample) -> None:
    if len(sample.output_ids) != len(sample.logprobs):
        raise ValueError(
            f"each completion token has one logprob: sample {sample.index} of prompt {sample.prompt_id} has "
            f"{len(sample.output_ids)} tokens and {len(sample.logprobs)} logprobs; the engine must return all of them"
        )
    if not sample.prompt_ids:
        raise ValueError(
            f"the first completion token needs a token before it: prompt {sample.prompt_id} is empty; "
            "remove the row or start data.prompt_format with text"
        )


def _advantage(sample: Sample) -> float:
    assert sample.advantage is not None, f"sample {sample.index} of prompt {sample.prompt_id} has no advantage yet"
    return sample.advantage
