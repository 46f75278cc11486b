"""One rank's share of the whole state in host memory: copied in lockstep, written while the next steps train.

Training waits for the copy alone. Its memory is taken before the first step, so that a machine which has too little of
it says so then, and serves every commit. What is written is bit for bit what `StateFolder.write` writes.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from grpo.config import Config
from grpo.run.threads import give_way
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed_private import KINDS, Shards
from grpo.trainer.finite import finite_flag, is_finite, not_finite, not_true
from grpo.trainer.published import stay_aside
from grpo.trainer.saving import write_policy
from grpo.trainer.state import HEADER, header_text, plan_files, share_prefix
from grpo.trainer.weights import LiveWeights
from grpo.types import TensorRecord

PIECE = 1 << 18
"""Elements that are copied and looked at while they are in the processor's cache."""
ALIGNMENT = 64
WEIGHT = "weight/"
"""Before the names of the policy's tensors, which rank 0 writes."""
FACTOR = "factor/"
"""Before those of an adapter's, which rank 0 writes too."""


Flags = dict[str, bool | torch.Tensor]
"""Whether a tensor is finite, by its name in an error."""


class HostMemory:
    """Room for named tensors in one piece, touched at once; a GPU copies into it without a detour."""

    def __init__(self, records: Mapping[str, TensorRecord], device: torch.device) -> None:
        size = 0
        places: dict[str, tuple[int, int, torch.dtype]] = {}
        for key, record in records.items():
            dtype: torch.dtype = getattr(torch, record.dtype)
            places[key] = size, size + record.numel * dtype.itemsize, dtype
            size += -(-record.numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.all = torch.empty(size, dtype=torch.uint8)
        if device.type == "cuda" and size:
            self._pin()
        self.all.fill_(0)
        self.views = {
            key: self.all[start:end].view(dtype).view(records[key].shape) for key, (start, end, dtype) in places.items()
        }

    def _pin(self) -> None:
        """Exactly this memory; what torch pins itself comes in powers of 2."""
        size = self.all.nbytes
        if status := int(torch.cuda.cudart().cudaHostRegister(self.all.data_ptr(), size, 0)):
            raise MemoryError(f"{size} bytes of the host cannot be pinned for a copy of the state (error {status})")


class StateSnapshot:
    """The state of one step at a time; `take` and `prepare` are called on all ranks together, `write` on each."""

    def __init__(
        self, weights: LiveWeights, shards: Shards, rank: int, ranks: int, device: torch.device, merged: bool = True
    ) -> None:
        """`merged`: with an adapter the whole policy is kept too."""
        self.weights, self.shards, self.device = weights, shards, device
        self.rank, self.ranks = rank, ranks
        self.whole = not weights.adapted or merged
        """Whether the policy is kept, and not an adapter alone."""
        self.files = plan_files(weights.param_records(), ranks)
        self.prefix = share_prefix(rank)
        self.memory: HostMemory | None = None
        self.texts: dict[str, str] = {}
        self.step = -1
        self._writing = threading.Lock()

    def prepare(self) -> HostMemory:
        """Takes the memory, once."""
        if self.memory is None:
            weights = self.weights.live_records() if self.rank == 0 and self.whole else {}
            records = {f"{WEIGHT}{name}": record for name, record in weights.items()}
            if self.rank == 0 and self.weights.adapted:
                records |= {f"{FACTOR}{record.name}": record for record in self.weights.param_records()}
            self.memory = HostMemory(records | self._share(), self.device)
        return self.memory

    def _share(self) -> dict[str, TensorRecord]:
        """What this rank keeps of the optimizer, by the names that the files give it."""
        found: dict[str, TensorRecord] = {}
        for record in self._mine(self.weights.param_records()):
            for kind in KINDS:
                found[f"{kind}/{record.name}"] = TensorRecord(record.name, record.shape, "float32")
            found[f"step/{record.name}"] = TensorRecord(record.name, (), "float32")
        return found

    def _mine(self, records: Sequence[TensorRecord]) -> list[TensorRecord]:
        return [record for record in records if self.files[record.name].startswith(self.prefix)]

    @torch.no_grad()
    def take(self, step: int, header: Mapping[str, object], texts: Mapping[str, str]) -> None:
        """Copies the state; `texts` are small files of this rank's own.

        Raises NonFiniteError on all ranks alike, naming a tensor of one that is not finite.
        """
        assert not self._writing.locked(), "a state is copied once the one before is written"
        self.step = -1
        flags = self._take_weights() | self._take_share()
        bad = not_true(flags)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # of all copies, which wait for nothing one by one
        raise_on_all_ranks(not_finite(bad))
        self.texts = dict(texts)
        if self.rank == 0:
            self.texts[HEADER] = header_text(header, self.files, self.ranks)
        self.step = step

    def _take_weights(self) -> Flags:
        views, flags = self.prepare().views, Flags()
        kinds = [(WEIGHT, self.weights.iterate())] * self.whole + [(FACTOR, self.weights.factors())]
        for kind, tensors in kinds:
            for name, tensor in tensors:
                goal = views[f"{kind}{name}"] if self.rank == 0 else None
                flags[f"weight of {name}"] = finite_flag(tensor) if goal is None else copy(goal, tensor)
        return flags

    def _take_share(self) -> Flags:
        """Every rank gathers every parameter; what another one keeps is looked at as far as it lies here."""
        views, flags = self.prepare().views, Flags()
        for name, param in self.weights.params.items():
            mine, shard = self.files[name].startswith(self.prefix), self.shards.of(param)
            for kind in KINDS:
                whole = self.shards.gather(param, kind)
                flag = copy(views[f"{kind}/{name}"], whole) if mine else finite_flag(shard.views[kind])
                flags[f"{kind} of {name}"] = flag
            if mine:
                views[f"step/{name}"].copy_(shard.step, non_blocking=True)
        return flags

    def write(self, folder: Path, step: int, config: Config) -> None:
        """Writes this rank's files of a step that was taken, in a thread beside the one that trains.

        No rank waits for another. Raises CheckpointError, ConfigError, or what a disk raises.
        """
        assert self.step == step and self.memory, f"step {step} is written, but {self.step} was taken"
        with self._writing:
            give_way()
            if self.device.type == "cpu":
                stay_aside()
            views = self.memory.views
            if self.rank == 0:
                if self.whole:
                    write_policy(self.weights.causal_lm, folder / "policy", named(views, WEIGHT), config)
                if self.weights.adapted:
                    self.weights.write_adapter(folder / "adapter", named(views, FACTOR), config)
            names = [record.name for record in self._mine(self.weights.param_records())]
            for file in dict.fromkeys(self.files[name] for name in names):
                keys = [f"{kind}/{name}" for name in names if self.files[name] == file for kind in (*KINDS, "step")]
                save_file({key: views[key] for key in keys}, folder / file)
            for name, text in self.texts.items():
                (folder / name).write_text(text)


def named(views: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Those of one kind, by their own names."""
    return {key.removeprefix(kind): view for key, view in views.items() if key.startswith(kind)}


def copy(goal: torch.Tensor, source: torch.Tensor) -> bool | torch.Tensor:
    """Copies a tensor to the host; whether all its elements are finite. Of a GPU's both come in its stream."""
    if source.device.type != "cpu":
        goal.copy_(source, non_blocking=True)
        return finite_flag(source)
    finite = True
    pieces = zip(goal.view(-1).split(PIECE), source.reshape(-1).split(PIECE), strict=True)
    for into, piece in pieces:
        into.copy_(piece)
        finite = finite and is_finite(into)
    return finite
