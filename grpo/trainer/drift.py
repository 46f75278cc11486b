"""How far the policy has moved since a version: what samples of older weights may differ by, and no more.

The samples of an older version were not made by the weights that score them. So a rank keeps a few rows of each step
with the logprobs that its weights gave them then, and scores them again with the weights of today. Those rows were
trained on in between; what fresh ones may move further is in the factor of the check. A checkpoint holds the rows, so
that a run which resumes checks its first samples too.
"""

import json
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import distributed

from grpo.algorithm.mismatch import FURTHEST
from grpo.config import Config
from grpo.trainer.model import Policy
from grpo.trainer.row_logprobs import scored
from grpo.types import Sample

ROWS, TOKENS = 8, 1024
"""What all ranks together keep of a step: so many rows, more of those with few trained tokens; at least one each."""


class Drift:
    """One rank's rows of the versions that samples may still come from. Ranks keep the same versions."""

    def __init__(self, config: Config, policy: Policy, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.oldest_lag = config.rollout.max_staleness + config.sync.every - 1
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.rows, self.budget = max(1, ROWS // self.ranks), config.fixed_tokens
        self.kept: dict[int, list[tuple[Sample, torch.Tensor]]] = {}

    def keep(self, version: int, samples: Sequence[Sample], logprobs_C: torch.Tensor) -> None:
        """Some of a micro-batch's rows with the logprobs of that version's weights. All ranks call it alike."""
        if not self.oldest_lag:
            return
        parts = logprobs_C.detach().split([sample.trained_tokens for sample in samples]) if samples else ()
        tokens = sum(sample.trained_tokens for sample in samples)
        rows = max(self.rows, len(samples) * TOKENS // max(1, tokens * distributed.get_world_size()))
        stride = -(-len(samples) // rows) or 1
        self.kept[version] = [
            (sample, part.clone()) for sample, part in zip(samples[::stride], parts[::stride], strict=True)
        ]
        needed = self._version(version + 1 - self.oldest_lag)
        self.kept = {one: rows for one, rows in self.kept.items() if needed is None or one >= needed}

    def since(self, version: int) -> float | None:
        """Mean |difference|, of a token FURTHEST at most, in nats between that version's weights and today's.

        A collective.

        None after a start from the beginning, as long as no rows are kept that are as old.
        """
        known = self._version(version)
        if known is None:
            return None
        rows = self.kept[known]
        now = scored(self.policy, [sample for sample, _ in rows], self.device)
        apart = [(new - old).abs().double().clamp(max=FURTHEST) for new, (_, old) in zip(now, rows, strict=True)]
        sums = torch.tensor([float(sum(part.numel() for part in apart)), 0.0], dtype=torch.float64, device=self.device)
        sums[1] += sum((part.sum() for part in apart), torch.zeros((), dtype=torch.float64, device=self.device))
        distributed.all_reduce(sums)
        tokens, total = sums.tolist()
        return float(total / max(tokens, 1.0))

    def dump(self) -> str:
        """This rank's rows as JSON, with every bit."""
        return json.dumps(
            {
                version: [
                    [sample.prompt_ids, sample.output_ids, sample.trained, logprobs.tolist()]
                    for sample, logprobs in rows
                ]
                for version, rows in self.kept.items()
            }
        )

    def restore(self, texts: Sequence[str]) -> None:
        """Goes on with the rows that all ranks have dumped, as many as they were. Raises as bad texts make it."""
        self.kept = {}
        if not (self.oldest_lag and texts):
            return
        of_ranks = [{int(version): rows for version, rows in json.loads(text).items()} for text in texts]
        if any(each.keys() != of_ranks[0].keys() for each in of_ranks):
            raise ValueError("ranks keep the same versions")
        for version in of_ranks[0]:
            mine = [self._row(version, *row) for each in of_ranks[self.rank :: self.ranks] for row in each[version]]
            if len(of_ranks) > self.ranks:  # of several ranks, and scored together: what one rank has room for
                ends = accumulate(len(sample.prompt_ids) + len(sample.output_ids) for sample, _ in mine)
                mine = mine[: max(1, sum(end <= self.budget for end in ends))]
            self.kept[version] = mine

    def _row(
        self,
        version: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        trained: Sequence[bool] | None,
        logprobs: Sequence[float],
    ) -> tuple[Sample, torch.Tensor]:
        """A row as it was kept, but for what no score follows from."""
        unused = (0.0,) * len(output_ids)
        mask = None if trained is None else tuple(trained)
        ids = tuple(prompt_ids), tuple(output_ids)
        sample = Sample("", 0, *ids, unused, ((0, version),), "stop", "", advantage=0.0, trained=mask)
        values = torch.tensor(logprobs, dtype=torch.float32, device=self.device)
        if len(values) != sample.trained_tokens:
            raise ValueError(f"{len(values)} logprobs of {sample.trained_tokens} tokens")
        return sample, values

    def _version(self, wanted: int) -> int | None:
        """The newest that is kept and not newer: a step without an update kept none, and changed nothing."""
        return max((version for version in self.kept if version <= wanted), default=None)
