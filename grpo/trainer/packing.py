"""Samples to packed micro-batches: which rows go where (`plan_minibatches`), and how they look to the model (`pack`).

Everything here is a pure function of its arguments. Every rank computes the whole plan by itself and finds the same
one, so nothing is sent between ranks to agree on it. Masks come from lengths, never from pad or end-of-text ids.
"""

import math
import random
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

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


class RowTokens(NamedTuple):
    """What a row costs a forward pass, in tokens. Rows of a micro-batch with the same prompt share its tokens."""

    prompt: Hashable
    prompt_tokens: int
    own_tokens: int


def row_tokens(sample: Sample) -> RowTokens:
    """What a sample weighs in a batch. Its last token predicts nothing and is not forwarded."""
    return RowTokens(sample.prompt_ids, len(sample.prompt_ids), max(len(sample.output_ids) - 1, 0))


def plan_minibatches(
    row_tokens_B: Sequence[RowTokens],
    *,
    ranks: int,
    minibatches: int,
    token_budget: int,
    seed: str,
    skip: Collection[int] = (),
    laid_out: float = math.inf,
) -> tuple[Minibatch, ...]:
    """One pass over the batch: every row is in exactly one minibatch and, unless skipped, in one of its micro-batches.

    `token_budget` is that of a micro-batch, `laid_out` the most tokens of its rows as attention sees them, each whole
    with its prompt; a row alone may have more. `seed` names the shuffle: "7/step 3/epoch 0". A minibatch's rows with
    the same prompt stay together as far as that leaves the ranks even. Raises ValueError if a row exceeds the budget.
    """
    for row, (_, prompt_tokens, own_tokens) in enumerate(row_tokens_B):
        if prompt_tokens + own_tokens > token_budget:
            raise ValueError(
                f"a row must fit a micro-batch: row {row} has {prompt_tokens + own_tokens} tokens, the budget is "
                f"{token_budget}; raise train.tokens_per_micro_batch"
            )
    order = list(range(len(row_tokens_B)))
    random.Random(seed).shuffle(order)
    bounds = [len(order) * part // minibatches for part in range(minibatches + 1)]
    parts = [order[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    skipped = frozenset(skip)
    return tuple(
        Minibatch(
            rows=tuple(part),
            micro_batches=_micro_batches(
                [r for r in part if r not in skipped], row_tokens_B, ranks, token_budget, laid_out
            ),
        )
        for part in parts
    )


def _micro_batches(
    rows: Sequence[int], row_tokens_B: Sequence[RowTokens], ranks: int, token_budget: int, laid_out: float
) -> tuple[tuple[Rows, ...], ...]:
    """Deals prompt groups to ranks, packs each rank's, and evens the numbers of micro-batches with empty ones."""
    prompt_groups = _prompt_groups(rows, row_tokens_B, token_budget, laid_out)
    if ranks > 1:
        share = sum(_cost(prompt_group, row_tokens_B) for prompt_group in prompt_groups) // ranks
        prompt_groups = _prompt_groups(rows, row_tokens_B, min(token_budget, share // 4), laid_out)
    dealt: list[list[Rows]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for prompt_group in sorted(
        prompt_groups, key=lambda prompt_group: (-_cost(prompt_group, row_tokens_B), prompt_group)
    ):
        rank = tokens.index(min(tokens))
        dealt[rank].append(prompt_group)
        tokens[rank] += _cost(prompt_group, row_tokens_B)
    packed = [_fill(mine, row_tokens_B, token_budget, laid_out) for mine in dealt]
    count = max(len(micro_batches) for micro_batches in packed)
    return tuple(tuple(micro_batches + [()] * (count - len(micro_batches))) for micro_batches in packed)


def _prompt_groups(rows: Sequence[int], row_tokens_B: Sequence[RowTokens], limit: int, laid_out: float) -> list[Rows]:
    """Rows with the same prompt, in groups of at most `limit` tokens (but at least one row), longest row first."""
    prompt_groups: list[list[int]] = []
    latest: dict[Hashable, list[int]] = {}
    for row in sorted(rows, key=lambda row: (-sum(row_tokens_B[row][1:]), row)):
        prompt_group = latest.get(row_tokens_B[row].prompt, [])
        more = [*prompt_group, row]
        if not prompt_group or _cost(more, row_tokens_B) > limit or _laid_out(more, row_tokens_B) > laid_out:
            prompt_group = []
            prompt_groups.append(prompt_group)
            latest[row_tokens_B[row].prompt] = prompt_group
        prompt_group.append(row)
    return [tuple(prompt_group) for prompt_group in prompt_groups]


def _cost(prompt_group: Sequence[int], row_tokens_B: Sequence[RowTokens]) -> int:
    """Tokens of rows that share their prompt."""
    return row_tokens_B[prompt_group[0]].prompt_tokens + sum(row_tokens_B[row].own_tokens for row in prompt_group)


def _laid_out(rows: Sequence[int], row_tokens_B: Sequence[RowTokens]) -> int:
    """Tokens of whole rows."""
    return sum(sum(row_tokens_B[row][1:]) for row in rows)


def _fill(
    prompt_groups: Sequence[Rows], row_tokens_B: Sequence[RowTokens], token_budget: int, laid_out: float
) -> list[Rows]:
    """Fills one micro-batch after the other, longest rows first: neighbours are alike, attention pads little."""
    micro_batches: list[Rows] = []
    room, space = 0, 0.0
    for prompt_group in sorted(
        prompt_groups, key=lambda prompt_group: (-sum(row_tokens_B[prompt_group[0]][1:]), prompt_group)
    ):
        cost, size = _cost(prompt_group, row_tokens_B), _laid_out(prompt_group, row_tokens_B)
        if not micro_batches or cost > room or size > space:
            micro_batches.append(())
            room, space = token_budget, laid_out
        micro_batches[-1] += prompt_group
        room, space = room - cost, space - size
    return micro_batches


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """R rows without padding: T forwarded tokens, among them a prompt of several rows once; C of them are scored.

    `expand_E` lists the rows behind each other, whole, as positions in T; `cu_seqlens_R1` are their R + 1 bounds in E
    and `select_T` where each forwarded token stands in E. `predict_C` are the positions in T whose next token is
    trained, `targets_C` that token, `rows_C` its row; `trained_lengths_R` counts those of a row. A filler (`rows` = 0)
    is one token that counts nowhere.
    """

    rows: int
    max_length: int
    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    expand_E: torch.Tensor
    cu_seqlens_R1: torch.Tensor
    select_T: torch.Tensor
    predict_C: torch.Tensor
    targets_C: torch.Tensor
    rows_C: torch.Tensor
    trained_lengths_R: torch.Tensor
    rollout_logprobs_C: torch.Tensor
    advantages_C: torch.Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Packs samples that have advantages; none give a filler. Raises ValueError if ids or logprobs are missing."""
    layout = _Layout()
    targets: list[int] = []
    rollout_logprobs: list[float] = []
    advantages: list[float] = []
    for sample in samples:
        _check(sample)
        layout.add(sample)
        places = sample.trained_places
        targets += [sample.output_ids[place] for place in places]
        rollout_logprobs += [sample.logprobs[place] for place in places]
        advantages += [_advantage(sample)] * len(places)
    lengths = [sample.trained_tokens for sample in samples]
    if not samples:
        layout.add(Sample("", 0, (0,), (0,), (), ((0, 0),), "stop", ""))
        targets, rollout_logprobs, advantages, lengths = [0], [float("nan")], [0.0], [1]
    return PackedBatch(
        rows=len(samples),
        max_length=max(end - start for start, end in zip(layout.bounds, layout.bounds[1:], strict=False)),
        input_ids_T=torch.tensor(layout.input_ids),
        position_ids_T=torch.tensor(layout.positions),
        expand_E=torch.tensor(layout.expand),
        cu_seqlens_R1=torch.tensor(layout.bounds, dtype=torch.int32),
        select_T=torch.tensor(layout.select),
        predict_C=torch.tensor(layout.predict, dtype=torch.int64),
        targets_C=torch.tensor(targets, dtype=torch.int64),
        rows_C=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        trained_lengths_R=torch.tensor(lengths),
        rollout_logprobs_C=torch.tensor(rollout_logprobs, dtype=torch.float32),
        advantages_C=torch.tensor(advantages, dtype=torch.float32),
    )


class _Layout:
    """Where the tokens of the rows go; see `PackedBatch`."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        self.select: list[int] = []
        self.expand: list[int] = []
        self.bounds = [0]
        self.predict: list[int] = []
        self.prompts: dict[tuple[int, ...], int] = {}

    def add(self, sample: Sample) -> None:
        """A prompt that is here already is not forwarded again."""
        prompt = sample.prompt_ids
        if prompt not in self.prompts:
            self.prompts[prompt] = self._forward(prompt, first_position=0)
        self._place(range(self.prompts[prompt], self.prompts[prompt] + len(prompt)))
        own = self._forward(sample.output_ids[:-1], first_position=len(prompt))
        self._place(range(own, len(self.input_ids)))
        self.bounds.append(len(self.expand))
        before_output = self.bounds[-2] + len(prompt) - 1  # each token is predicted at the place before it
        self.predict += [self.expand[before_output + place] for place in sample.trained_places]

    def _forward(self, token_ids: tuple[int, ...], first_position: int) -> int:
        start = len(self.input_ids)
        self.input_ids += token_ids
        self.positions += range(first_position, first_position + len(token_ids))
        return start

    def _place(self, tokens: range) -> None:
        """Lists forwarded tokens in the row; a token's first place is the one that its attention is taken from."""
        self.select += range(len(self.expand), len(self.expand) + len(tokens)) if tokens.stop > len(self.select) else ()
        self.expand += tokens


def _check(sample: Sample) -> None:
    if len(sample.output_ids) != len(sample.logprobs):
        raise ValueError(
            f"each completion token has one logprob: sample {sample.index} of prompt {sample.prompt_id} has "
            f"{len(sample.output_ids)} tokens and {len(sample.logprobs)} logprobs; the engine must return all of them"
        )
    if sample.trained is not None and len(sample.trained) != len(sample.output_ids):
        raise ValueError(
            f"each completion token is trained or not: sample {sample.index} of prompt {sample.prompt_id} has "
            f"{len(sample.output_ids)} tokens and a mask of {len(sample.trained)}; give one for each"
        )
    if not sample.prompt_ids:
        raise ValueError(
            f"the first completion token needs a token before it: prompt {sample.prompt_id} is empty; "
            "remove the row or start data.prompt_format with text"
        )


def _advantage(sample: Sample) -> float:
    assert sample.advantage is not None, f"sample {sample.index} of prompt {sample.prompt_id} has no advantage yet"
    return sample.advantage
