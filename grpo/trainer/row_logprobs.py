"""Logprobs of a step's rows under weights that do not move within it: each row once, without a gradient."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import distributed

from grpo.errors import NonFiniteError
from grpo.trainer.packing import Minibatch, Rows, pack
from grpo.types import Sample

Scores = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""A policy: logprobs and entropies of a packed batch."""


class RowLogprobs:
    """Of one model, for one step at a time. A row is its place in the batch."""

    def __init__(self, policy: Scores, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.known: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """A new step begins."""
        self.known.clear()

    def compute(self, batch: Sequence[Sample], rows: Rows) -> None:
        """One forward; of a filler if there are no rows, as ZeRO's collectives need all ranks."""
        self.known |= zip(rows, scored(self.policy, [batch[row] for row in rows], self.device), strict=True)

    def of(self, batch: Sequence[Sample], rows: Rows) -> torch.Tensor:
        """The rows' logprobs behind each other; what is not known yet is computed."""
        missing = tuple(row for row in rows if row not in self.known)
        if missing:
            self.compute(batch, missing)
        return torch.cat([self.known[row] for row in rows])

    def compute_all(self, batch: Sequence[Sample], minibatches: Iterable[Minibatch], rank: int) -> None:
        """Those of all ranks, which share the work: a later pass deals the rows otherwise. A collective.

        In the micro-batches that are trained, so that they are bit for bit what training computes there.
        """
        of_ranks = [rank_rows for minibatch in minibatches for rank_rows in zip(*minibatch.micro_batches, strict=True)]
        for rows_of_ranks in of_ranks:
            self.compute(batch, rows_of_ranks[rank])
        everyone = sorted(row for rows_of_ranks in of_ranks for rows in rows_of_ranks for row in rows)
        lengths = [batch[row].trained_tokens for row in everyone]
        values = torch.zeros(sum(lengths), device=self.device)
        for row, part in zip(everyone, values.split(lengths), strict=True):
            if row in self.known:
                part.copy_(self.known[row])
        distributed.all_reduce(values)  # every other rank adds 0
        self.known = dict(zip(everyone, values.split(lengths), strict=True))

    def divergence(self, sample: Sample, row: int) -> float:
        """log sampler - log of this model, over the whole completion (k1); what the sampler does not know counts 0.

        Raises NonFiniteError if it is no number: no reward can lose that.
        """
        if row not in self.known:
            return 0.0
        sampler = torch.tensor([sample.logprobs[place] for place in sample.trained_places], device=self.device)
        apart = float(torch.where(sampler.isnan(), 0.0, sampler - self.known[row]).double().sum())
        if not math.isfinite(apart):
            raise NonFiniteError(
                f"KL to the reference must be finite to be taken off a reward, but is {apart} for sample "
                f"{sample.index} of prompt {sample.prompt_id}; use model.dtype float32, or another model.path"
            )
        return apart


@torch.no_grad()
def scored(policy: Scores, samples: Sequence[Sample], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Logprobs of each sample's trained tokens in one forward; of none, a filler's is made and dropped."""
    logprobs_C, _ = policy(pack(samples).to(device))
    return logprobs_C.split([sample.trained_tokens for sample in samples]) if samples else ()
