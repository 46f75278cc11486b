"""What the losses of a minibatch's micro-batches have in common: the sizes of the whole, on all ranks together."""

from collections import Counter
from collections.abc import Sequence

import torch

from grpo.algorithm.inputs import LossInputs, Normaliser
from grpo.trainer.packing import PackedBatch
from grpo.types import Sample


class LossWindow:
    """Of one minibatch, by all its rows, the skipped ones too."""

    def __init__(self, samples: Sequence[Sample], max_tokens: int, kl_coef: float, far: float) -> None:
        self.kl_coef, self.far = kl_coef, far
        trained = [sample for sample in samples if sample.trained_tokens]
        self.prompt_tokens: Counter[str] = Counter()
        for sample in trained:
            self.prompt_tokens[sample.prompt_id] += sample.trained_tokens
        self.normaliser = Normaliser(
            self.prompt_tokens.total(), len(trained), max_tokens, prompts=len(self.prompt_tokens)
        )

    def inputs(
        self,
        samples: Sequence[Sample],
        packed: PackedBatch,
        logprobs_C: torch.Tensor,
        entropy_C: torch.Tensor,
        reference_C: torch.Tensor | None = None,
        start_C: torch.Tensor | None = None,
    ) -> LossInputs:
        """Of a micro-batch of these samples."""
        tokens_R = torch.tensor([self.prompt_tokens[sample.prompt_id] for sample in samples], device=logprobs_C.device)
        return LossInputs(
            logprobs_C,
            packed.rollout_logprobs_C,
            packed.advantages_C,
            packed.rows_C,
            packed.trained_lengths_R,
            self.normaliser,
            entropy_C,
            reference_C,
            start_C,
            prompt_tokens_R=tokens_R,
            kl_coef=self.kl_coef,
            far=self.far,
        )
