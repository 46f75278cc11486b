"""The policy's live state under its Hugging Face names: list, iterate, perturb and restore, save.

With an adapter what is listed and iterated is the merged policy, and what an optimizer moves is the adapter.

The state are the parameters and the buffers that a checkpoint of the model holds: what a router adds to the scores of
its experts, for one. No optimizer moves them, and who loads the model without them computes something else.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.core_model_loading import revert_weight_conversion

from grpo.config import Config
from grpo.errors import CheckpointError, GrpoError
from grpo.trainer.adapter import adapted_layers, factor_b, is_factor, model_name, target_names
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed import gathered
from grpo.trainer.finite import is_finite, not_finite
from grpo.trainer.saving import write_adapter, write_policy
from grpo.types import TensorRecord
from grpo.weights.digest import record

SMALLEST_NOISE = 0.01
"""Root mean square below which a tensor (a bias of zeros) is perturbed as if it had this one."""

HEAD = 4.0
"""How much more noise the head gets than other tensors. An engine that does not refresh its copy of a tied one misses
that noise alone: without this a fifth of what all noise does, which the self-test allows for; with it a half."""

LEAST_REACH = 0.02
"""Below it (`Adapted.reach`) a whole step of an adapter may round away in bfloat16, from any matrix."""


class LiveWeights:
    """The weights of a causal LM, whole or sharded by ZeRO, tied ones once. All ranks must call every verb."""

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm = causal_lm
        named = {model_name(name): param for name, param in causal_lm.named_parameters()}
        self.adapted = adapted_layers(causal_lm)
        """The layers that have an adapter, by the name of their weight."""
        self.whole = {name: param for name, param in named.items() if not is_factor(name)}
        """The parameters of the model that engines hold, without what an adapter adds to them."""
        self.params = {name: param for name, param in named.items() if is_factor(name)} if self.adapted else self.whole
        """Those that an optimizer moves."""
        self.buffers = persistent_buffers(causal_lm)
        self.originals: dict[str, torch.Tensor] = {}
        self._records: tuple[TensorRecord, ...] = ()
        self._places: list[int] = []
        self._in_place: list[tuple[str, torch.Tensor]] | None = None

    def records(self) -> tuple[TensorRecord, ...]:
        """Names, full shapes and dtypes, in the order of `published`."""
        self._records = self._records or tuple(self._announced())
        return self._records

    def _announced(self) -> list[TensorRecord]:
        found = []
        for name, tensor in [*self.whole.items(), *self.buffers.items()]:
            shape = getattr(tensor, "ds_shape", tensor.shape)
            empty = torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")
            moves = not self.adapted or (name in self.adapted and self.adapted[name].reach >= LEAST_REACH)
            saved = as_saved(self.causal_lm, name, empty)
            found += [replace(_record(*each), moves=moves) for each in saved.items()]
        return found

    def published(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The state by the names of a checkpoint of this model, which an engine loads at its start too.

        A list where these are the live tensors or views of them, which stay where they are.
        """
        if self.adapted:  # what is merged lies nowhere else
            return self._converted()
        places = [tensor.data_ptr() for tensor in (*self.params.values(), *self.buffers.values())]
        if any(hasattr(param, "ds_shape") for param in self.params.values()):  # a part of each is here, at stage 3
            return self._converted()
        if places != self._places:
            self._places, self._in_place = places, self._views()
        return self._converted() if self._in_place is None else self._in_place

    def _converted(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.iterate():
            yield from as_saved(self.causal_lm, name, tensor).items()

    def _views(self) -> list[tuple[str, torch.Tensor]] | None:
        """What `_converted` yields, if none of it is a copy: asking transformers takes longer than sending."""
        live = {tensor.untyped_storage().data_ptr() for _, tensor in self.iterate()}
        found = []
        for name, tensor in self._converted():
            if tensor.untyped_storage().data_ptr() not in live:
                return None
            found.append((name, tensor))
        return found

    def param_records(self) -> tuple[TensorRecord, ...]:
        """Those that an optimizer moves."""
        return tuple(_record(name, param) for name, param in self.params.items())

    def live_records(self) -> dict[str, TensorRecord]:
        """What `iterate` yields, in its order."""
        return {name: _record(name, tensor) for name, tensor in [*self.whole.items(), *self.buffers.items()]}

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each whole tensor on the training device. Asking for the next one frees it at stage 3."""
        for name, param in self.whole.items():
            one = self.adapted.get(name)
            with gathered([param, one.a_RI, one.b_OR] if one else [param]):
                yield name, one.merged() if one else param.detach()
        yield from self.buffers.items()

    def factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter alone, as `iterate` yields the whole."""
        for name, param in self.params.items() if self.adapted else ():
            with gathered([param]):
                yield name, param.detach()

    def frozen_digest(self) -> str:
        """Of the weights below an adapter, which no checkpoint holds; "" without an adapter. A collective."""
        found = hashlib.sha256()
        for name, param in self.whole.items() if self.adapted else ():
            with gathered([param]):
                found.update(repr(record(name, param.detach())).encode())
        return found.hexdigest()[:32] if self.adapted else ""

    @torch.no_grad()
    def perturb(self, scale: float, seed: int) -> None:
        """Adds normal noise of `scale` times each tensor's root mean square, the same on all ranks; keeps a copy.

        On a GPU the noise is made there, and the copy stays there if it takes no more than a part of what is free.
        A matrix under an adapter gets as much, but through that alone: an adapter that does not arrive shows itself.
        """
        assert not self.originals, "the weights are perturbed already"
        device, head = next(iter(self.params.values())).device, self.causal_lm.get_output_embeddings()
        generator = torch.Generator(device).manual_seed(seed)
        keep = device if device.type == "cuda" and self._fits(device) else torch.device("cpu")

        def add(name: str, param: torch.nn.Parameter, size: float) -> None:
            self.originals[name] = param.detach().to(keep, copy=True)
            noise = torch.randn(param.shape, generator=generator, device=device) * (scale * size)
            param.add_(noise.to(param.dtype))

        for name, param in self.whole.items():
            if name in self.adapted:
                continue
            with gathered([param], modify=True):
                size = max(float(param.float().square().mean().sqrt()), SMALLEST_NOISE)
                add(name, param, size * (HEAD if head is not None and param is head.weight else 1.0))
        for one in self.adapted.values():
            with gathered([one.frozen, one.a_RI, one.b_OR], modify=True):
                add(factor_b(one.name), one.b_OR, one.size_of_b())

    def _fits(self, device: torch.device) -> bool:
        """Whether a copy of the weights takes less than half of what is free."""
        free, _ = torch.cuda.mem_get_info(device)
        return 2 * sum(record.nbytes for record in self.live_records().values()) < free

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies back, bit for bit."""
        for name, param in [*self.whole.items(), *self.params.items()]:
            if name in self.originals:
                with gathered([param], modify=True):
                    param.copy_(self.originals.pop(name))

    def save(self, path: Path, config: Config) -> None:
        """Rank 0 writes a Hugging Face folder; who publishes it makes it durable and visible (`store`).

        Raises on all ranks alike: NonFiniteError if a weight is not finite, CheckpointError if it cannot be written.
        """
        self._write(partial(write_policy, self.causal_lm, path, config=config), self._copied(self.iterate()), path)

    def save_adapter(self, path: Path, config: Config) -> None:
        """The same for the adapter alone, as PEFT's folder."""
        self._write(partial(self.write_adapter, path, config=config), self._copied(self.factors()), path)

    def try_saving(self, folder: Path, config: Config) -> None:
        """Rank 0 writes the folders of a checkpoint without weights, which only the disk could refuse.

        Raises what `save` raises.
        """
        if config.train.lora:
            self._write(partial(self.write_adapter, folder / "adapter", config=config), {}, folder / "adapter")
        if not config.train.lora or config.checkpoint.merged:
            path = folder / "policy"
            self._write(partial(write_policy, self.causal_lm, path, config=config), {}, path)

    def write_adapter(self, path: Path, factors: Mapping[str, torch.Tensor], config: Config) -> None:
        """Writes factors that were copied."""
        assert config.train.lora, "only an adapter is written alone"
        write_adapter(path, factors, target_names(self.causal_lm, config.train.lora), config)

    def _copied(self, live: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in live:
            if distributed.get_rank() == 0:
                tensors[name] = tensor.to("cpu", copy=True)
        failure: GrpoError | None = None
        if distributed.get_rank() == 0:
            failure = not_finite([f"weight of {name}" for name, tensor in tensors.items() if not is_finite(tensor)])
        raise_on_all_ranks(failure)
        return tensors

    def _write(
        self, write: Callable[[dict[str, torch.Tensor]], None], tensors: dict[str, torch.Tensor], path: Path
    ) -> None:
        failure: GrpoError | None = None
        if distributed.get_rank() == 0:
            try:
                write(tensors)
            except GrpoError as error:
                failure = error
            except OSError as error:
                failure = CheckpointError(
                    f"the policy must be saved whole: writing {path} failed ({error}); free space or choose another "
                    "run.dir"
                )
        raise_on_all_ranks(failure)


def persistent_buffers(causal_lm: Any) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint of the model holds, by name."""
    saved = causal_lm.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in causal_lm.named_buffers() if name in saved}


def as_saved(causal_lm: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as a checkpoint holds it: transformers fuses experts when it loads a model, and renames some tensors."""
    saved: dict[str, torch.Tensor] = revert_weight_conversion(causal_lm, {name: tensor})
    return saved


def _record(name: str, tensor: torch.Tensor) -> TensorRecord:
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    return TensorRecord(name, shape, str(tensor.dtype).removeprefix("torch."))
