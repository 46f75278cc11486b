"""Where each tensor of the policy lies in an engine's model: learned while vLLM loads one version, proved, then used.

vLLM's reload takes any model, but walks through all its layers for every tensor: a fixed time, however small the model
and fast the link. Where it does nothing but put each tensor somewhere, whole (q, k and v into one weight below each
other), the next version can be put there directly.

What a reload does with the tensors is watched operation by operation. Anything but a copy that makes other tensors of
them, such as packing for the CPU, quantisation or products of weights, means that the model computes with more than
what lies there: then there are no places, and every version goes through the reload.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.types import TensorRecord
from grpo.weights.digest import records, sums

METADATA = {"empty_like", "new_empty", "new_empty_strided", "zeros_like", "new_zeros", "ones_like", "new_ones"}
"""Operations that look at a tensor's shape alone."""
Tensors = Mapping[str, torch.Tensor]


class Places:
    """Views of a model's own weights, by the names under which they are sent."""

    def __init__(self, views: Tensors) -> None:
        self.views = dict(views)

    def of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Where a tensor belongs; None for one that does not."""
        view = self.views.get(name)
        return view if view is not None and (tuple(view.shape), view.dtype) == (shape, dtype) else None

    def fill(self, tensors: Sequence[tuple[TensorRecord, torch.Tensor]]) -> list[str]:
        """Puts a whole version there; what is then not as its record says."""
        names = {record.name for record, _ in tensors}
        problems = [f"{name} is not in the copy" for name in self.views if name not in names]
        pairs = [
            (record, self.of(record.name, tuple(tensor.shape), tensor.dtype), tensor) for record, tensor in tensors
        ]
        problems += [f"{record.name} has no place in the model" for record, view, _ in pairs if view is None]
        if problems:
            return problems
        views = [view for _, view, _ in pairs if view is not None]
        torch._foreach_copy_(views, [tensor for *_, tensor in pairs], non_blocking=True)
        found = records([(record.name, view) for (record, *_), view in zip(pairs, views, strict=True)], sums(views))
        both = zip(pairs, found, strict=True)
        return [f"{record.name} has changed since it was received" for (record, *_), now in both if now != record]


class Watch(TorchDispatchMode):
    """Follows tensors through a reload: from where they have arrived into layers, and from there into the model.

    It is on while vLLM loads, and not while tensors arrive and are looked at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: dict[str, TensorRecord] = {}
        self.lying: dict[int, dict[str, int]] = {}  # storage -> name -> its first byte there
        self.copied: dict[str, int] = {}  # name -> the storage that it was copied to last
        self.reason = ""
        """Why there can be no places."""

    def expect(self, record: TensorRecord, tensor: torch.Tensor) -> None:
        """This tensor has arrived, and is loaded next. It may lie where others lay before, which are gone."""
        start, end = _span(tensor)
        before = self.lying.get(_storage(tensor), {})
        kept = {name: at for name, at in before.items() if at + self.records[name].nbytes <= start or at >= end}
        self.lying[_storage(tensor)] = kept | {record.name: start}
        self.records[record.name] = record
        if not tensor.is_contiguous():
            self.reason = f"{record.name} is not contiguous"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.reason:
            self._look(func, [*args, *(kwargs or {}).values()], result)
        return result

    def _look(self, func: Any, args: Sequence[Any], result: Any) -> None:
        taken, made = _storages(args), _storages(result)
        followed = any(self.lying.get(storage) for storage in taken)
        for storage in made - taken:  # memory that was another tensor's before
            self.lying.pop(storage, None)
        name = func._schema.name.removeprefix("aten::")
        if func is torch.ops.aten.copy_.default:
            if _storages(args[:1]):
                self._copy(args[0], args[1])
        elif followed and name not in METADATA and (made - taken or not _has_tensor(result)):
            self.reason = f"{name} makes something else of it"

    def _copy(self, goal: torch.Tensor, source: torch.Tensor) -> None:
        start, end = _span(source)
        sizes = {name: self.records[name].nbytes for name in self.lying.get(_storage(source), ())}
        lying = self.lying.get(_storage(source), {})
        inside = {name: first for name, first in lying.items() if first < end and first + sizes[name] > start}
        if not inside:
            return
        named, place = ", ".join(inside), _storage(goal)
        whole = all(start <= first and first + sizes[name] <= end for name, first in inside.items())
        if not (whole and goal.is_contiguous() and source.is_contiguous() and goal.dtype == source.dtype):
            self.reason = f"{named}: only a part of it, or in another form"
        if any(self.copied.get(name, place) not in (place, _storage(source)) for name in inside):
            self.reason = f"{named}: to two places"
        shift = _span(goal)[0] - start
        self.lying.setdefault(place, {}).update({name: first + shift for name, first in inside.items()})
        self.copied |= dict.fromkeys(inside, place)

    def places(self, model: torch.nn.Module) -> Places | None:
        """Of the model that has been loaded, if every tensor lies in it, bit for bit; else the reason is told."""
        views: dict[str, torch.Tensor] = {}
        for tensor in [] if self.reason else [*model.parameters(), *model.buffers()]:
            for name, first in self.lying.get(_storage(tensor), {}).items():
                views |= _view(tensor.detach(), first, self.records[name])
        missing = [name for name in self.records if name not in views]
        if missing and not self.reason:
            self.reason = f"{missing[0]} does not lie in the model as it is sent"
        if self.reason:
            return None
        wanted = [(record, views[name]) for name, record in self.records.items()]
        found = records([(record.name, view) for record, view in wanted], sums([view for _, view in wanted]))
        wrong = [record.name for (record, _), now in zip(wanted, found, strict=True) if now != record]
        if wrong:
            self.reason = f"{wrong[0]} is another in the model"
        return None if wrong else Places(views)


def _view(tensor: torch.Tensor, first: int, record: TensorRecord) -> Tensors:
    """The record's tensor in one of the model, from that byte of its storage on; none if it does not lie inside."""
    start, end = _span(tensor)
    if not tensor.is_contiguous() or first < start or first + record.nbytes > end or not record.numel:
        return {}
    begin = (first - start) // tensor.element_size()
    return {record.name: tensor.view(-1)[begin : begin + record.numel].view(record.shape)}


def _storages(values: Any) -> set[int]:
    """Of all tensors that have memory."""
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return {_storage(leaf) for leaf in found if leaf.device.type != "meta" and leaf.untyped_storage().nbytes()}


def _has_tensor(values: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(values))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in its storage, and the byte behind it, of a contiguous tensor."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    return first, first + tensor.numel() * tensor.element_size()
