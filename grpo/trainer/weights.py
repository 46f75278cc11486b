"""The policy's live weights under their Hugging Face names: list, iterate, perturb and restore, save."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoTokenizer

from grpo.errors import CheckpointError, GrpoError
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed import gathered
from grpo.trainer.finite import is_finite, not_finite
from grpo.types import TensorRecord

SMALLEST_NOISE = 0.01
"""Root mean square below which a tensor (a bias of zeros) is perturbed as if it had this one."""


class LiveWeights:
    """The weights of a causal LM, whole or sharded by ZeRO, tied ones once. All ranks must call every verb."""

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm = causal_lm
        self.params: dict[str, torch.nn.Parameter] = dict(causal_lm.named_parameters())
        self.originals: dict[str, torch.Tensor] = {}

    def records(self) -> tuple[TensorRecord, ...]:
        """Names, full shapes and dtypes, in the order of `iterate`."""
        return tuple(
            TensorRecord(name, tuple(getattr(param, "ds_shape", param.shape)), str(param.dtype).removeprefix("torch."))
            for name, param in self.params.items()
        )

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each whole tensor on the training device. Asking for the next one frees it at stage 3."""
        for name, param in self.params.items():
            with gathered([param]):
                yield name, param.detach()

    @torch.no_grad()
    def perturb(self, scale: float, seed: int) -> None:
        """Adds normal noise of `scale` times each tensor's root mean square, the same on all ranks; keeps a copy."""
        assert not self.originals, "the weights are perturbed already"
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.params.items():
            with gathered([param], modify=True):
                self.originals[name] = param.detach().to("cpu", copy=True)
                size = max(float(param.float().square().mean().sqrt()), SMALLEST_NOISE)
                noise = torch.randn(param.shape, generator=generator) * (scale * size)
                param.add_(noise.to(param.device, param.dtype))

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies back, bit for bit."""
        for name, param in self.params.items():
            with gathered([param], modify=True):
                param.copy_(self.originals.pop(name))

    def save(self, path: Path, tokenizer_path: str, revision: str | None) -> None:
        """Rank 0 writes a Hugging Face folder; who publishes it makes it durable and visible (`store`).

        Raises on all ranks alike: NonFiniteError if a weight is not finite, CheckpointError if it cannot be written.
        """
        tensors = {}
        for name, tensor in self.iterate():
            if distributed.get_rank() == 0:
                tensors[name] = tensor.to("cpu", copy=True)
        failure: GrpoError | None = None
        if distributed.get_rank() == 0:
            failure = not_finite([f"weight of {name}" for name, tensor in tensors.items() if not is_finite(tensor)])
        raise_on_all_ranks(failure)
        if distributed.get_rank() == 0:
            try:
                self._write(path, tensors, tokenizer_path, revision)
            except CheckpointError as error:
                failure = error
        raise_on_all_ranks(failure)

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], tokenizer_path: str, revision: str | None) -> None:
        if path.exists():
            raise CheckpointError(
                f"saved weights are never overwritten: {path} exists; move it away or choose another run.dir"
            )
        try:
            path.mkdir(parents=True)
            self.causal_lm.save_pretrained(path, state_dict=tensors)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, revision=revision, trust_remote_code=False)
            tokenizer.save_pretrained(path)
        except OSError as error:
            raise CheckpointError(
                f"the policy must be saved whole: writing {path} failed ({error}); free space or choose another run.dir"
            ) from error
