"""The trainer's whole state in files without pickle, read back bit for bit by any number of ranks at any ZeRO stage.

The folder holds:
- policy/, the weights in model.dtype as Hugging Face folder, by rank 0, with an adapter those merged, if at all;
- adapter/, an adapter alone, in model.dtype, as PEFT's folder, by rank 0;
- optimizer-00001-000.safetensors, fp32 weights, AdamW's moments and step of parameters 1, 1 + W, ..., by rank 1 of W;
- rng-00001.json, rank 1's random generators;
- drift-00001.json, rank 1's rows of older versions, where samples may be of such (`drift.py`);
- trainer.json, which file holds which parameter, and the counters, by rank 0, last.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed

from grpo.errors import CheckpointError, GrpoError
from grpo.trainer import rng
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed import gathered
from grpo.trainer.deepspeed_private import KINDS, Shards
from grpo.trainer.drift import Drift
from grpo.types import TensorRecord

FORMAT = 1
HEADER = "trainer.json"
FILE_BYTES = 2 << 30
DAMAGED = (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What a file that is missing, cut off or of another make can raise."""


def share_prefix(rank: int) -> str:
    """With which the names of the files of a rank's parameters begin."""
    return f"optimizer-{rank:05d}-"


def rng_file(rank: int) -> str:
    """The file of a rank's random generators."""
    return f"rng-{rank:05d}.json"


def drift_file(rank: int) -> str:
    """The file of a rank's rows of older versions."""
    return f"drift-{rank:05d}.json"


def header_text(header: Mapping[str, object], files: Mapping[str, str], ranks: int) -> str:
    """The content of trainer.json."""
    return json.dumps({"format": FORMAT, "world_size": ranks, "files": files} | dict(header), indent=1)


def plan_files(records: Sequence[TensorRecord], ranks: int, limit: int = FILE_BYTES) -> dict[str, str]:
    """The file of each parameter: rank r has parameters r, r + ranks, ..., as many to a file as `limit` bytes hold."""
    files: dict[str, str] = {}
    for rank in range(ranks):
        part = used = 0
        for record in records[rank::ranks]:
            size = 4 * len(KINDS) * record.numel
            if used and used + size > limit:
                part, used = part + 1, 0
            used += size
            files[record.name] = f"{share_prefix(rank)}{part:03d}.safetensors"
    return {record.name: files[record.name] for record in records}


class StateFolder:
    """One rank's view of the folder."""

    def __init__(
        self,
        folder: Path,
        params: Mapping[str, torch.nn.Parameter],
        records: Sequence[TensorRecord],
        shards: Shards,
        frozen: str = "",
    ) -> None:
        """`frozen` is the digest of the weights below an adapter."""
        self.folder, self.params, self.records, self.shards, self.frozen = folder, params, records, shards, frozen
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()

    def write(self, header: Mapping[str, object], texts: Mapping[str, str]) -> None:
        """Writes this rank's files, `texts` among them. Raises CheckpointError on all ranks alike."""
        files = plan_files(self.records, self.ranks)
        failure = self._write_shares(files)
        try:
            for name, text in texts.items():
                (self.folder / name).write_text(text)
        except OSError as error:
            failure = failure or self._unwritten(error)
        raise_on_all_ranks(failure)
        if self.rank == 0:
            try:
                (self.folder / HEADER).write_text(header_text(header, files, self.ranks))
            except OSError as error:
                failure = self._unwritten(error)
        raise_on_all_ranks(failure)

    def _write_shares(self, files: Mapping[str, str]) -> GrpoError | None:
        """Gathers every parameter; a rank that cannot write goes on gathering, as the others need it."""
        failure: GrpoError | None = None
        mine = share_prefix(self.rank)
        held: dict[str, torch.Tensor] = {}
        left = [file for file in files.values() if file.startswith(mine)]
        for name, param in self.params.items():
            whole = {kind: self.shards.gather(param, kind) for kind in KINDS}
            if not files[name].startswith(mine):
                continue
            left.pop(0)
            held |= {f"{kind}/{name}": tensor.to("cpu", copy=True) for kind, tensor in whole.items()}
            held[f"step/{name}"] = self.shards.of(param).step.to("cpu", copy=True)
            if left[:1] != [files[name]]:  # the file's last parameter
                try:
                    save_file(held, self.folder / files[name])
                except (OSError, SafetensorError) as error:
                    failure = failure or self._unwritten(error)
                held = {}
        return failure

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint must be written whole: rank {self.rank} failed in {self.folder} ({error}); free space or "
            "choose another checkpoint.dir"
        )

    def read(self, device: torch.device, drift: Drift) -> dict[str, Any]:
        """Reads the state into the live tensors and `drift`; returns the header.

        Raises CheckpointError on all ranks alike.
        """
        header: dict[str, Any] = {}
        failure: GrpoError | None = None
        try:
            header = self._read_header()
            self._read_shares(header["files"])
            self._read_rng(header["world_size"], device)
            self._read_drift(header["world_size"], drift)
        except CheckpointError as error:
            failure = error
        raise_on_all_ranks(failure)
        with torch.no_grad():
            for param in self.params.values():
                whole = self.shards.gather(param, "master")
                with gathered([param], modify=True):
                    param.copy_(whole)
        return header

    def _read_header(self) -> dict[str, Any]:
        path = self.folder / HEADER
        try:
            header: dict[str, Any] = json.loads(path.read_text())
            found, names, ranks = header["format"], set(header["files"]), int(header["world_size"])
            frozen = str(header.get("frozen", ""))
            for name, value in header["counters"].items():
                if not 0 <= float(value) < math.inf:
                    raise ValueError(f"counter {name} is {value}")
        except DAMAGED as error:
            raise damaged(path, "it does not open", error) from error
        if found != FORMAT or ranks < 1:
            raise CheckpointError(f"{path} must be of format {FORMAT}, but says {found}; use the grpo that wrote it")
        if bool(frozen) != bool(self.frozen):
            held, wanted = ("an adapter", "none") if frozen else ("the whole model", "an adapter")
            raise CheckpointError(
                f"a checkpoint must hold what is trained, but {path} is of {held}, and train.lora asks for {wanted}; "
                "set train.lora as the run began, or choose another run.dir"
            )
        if names != set(self.params):
            odd = sorted(names ^ set(self.params))
            raise CheckpointError(
                f"a checkpoint must hold the model's parameters, but {path} and model.path differ in {len(odd)}, "
                f"the first is {odd[0]}; set model.path to the model that the run began with"
                + " and train.lora to its adapter"
                * bool(frozen)
            )
        if frozen != self.frozen:
            raise CheckpointError(
                f"an adapter goes on with the very weights that it was trained on, but those of model.path have digest "
                f"{self.frozen}, and {path} is of {frozen}; set model.path and model.dtype as the run began"
            )
        return header

    def _read_shares(self, files: Mapping[str, str]) -> None:
        for name in sorted(set(files.values())):
            path = self.folder / name
            try:
                file = safe_open(path, framework="pt")
            except DAMAGED as error:
                raise damaged(path, "it does not open", error) from error
            with file as tensors:
                for record in self.records:
                    if files[record.name] == name:
                        self._read_parameter(path, tensors, record)

    def _read_parameter(self, path: Path, tensors: Any, record: TensorRecord) -> None:
        param = self.params[record.name]
        for kind in (*KINDS, "step"):
            key, shape = f"{kind}/{record.name}", () if kind == "step" else record.shape
            try:
                tensor: torch.Tensor = tensors.get_tensor(key)
            except DAMAGED as error:
                raise damaged(path, f"tensor {key} does not read", error) from error
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise damaged(path, f"tensor {key} is {found} and not torch.float32 {shape}")
            if kind == "step":
                self.shards.of(param).step.copy_(tensor)
            else:
                self.shards.put(param, kind, tensor)

    def _read_rng(self, written_by: int, device: torch.device) -> None:
        """This rank's generators; more ranks than before get theirs from rank 0's."""
        path = self.folder / rng_file(self.rank if self.rank < written_by else 0)
        try:
            text = path.read_text()
            rng.restore(text, device)
        except (*DAMAGED, RuntimeError) as error:
            raise damaged(path, "it does not hold the generators' states", error) from error
        if self.rank >= written_by:
            rng.derive(text, self.rank)

    def _read_drift(self, written_by: int, drift: Drift) -> None:
        """Those of all ranks, which are dealt anew; a checkpoint without such files has none."""
        paths = [path for rank in range(written_by) if (path := self.folder / drift_file(rank)).exists()]
        try:
            drift.restore([path.read_text() for path in paths])
        except DAMAGED as error:
            raise damaged(
                paths[0], "it and those of the other ranks do not hold rows of older versions", error
            ) from error


def damaged(path: Path, what: str, error: Exception | None = None) -> CheckpointError:
    """The error about a file that is not as it was written."""
    cause = f" ({error})" if error else ""
    return CheckpointError(
        f"a checkpoint's files must be whole, but of {path} {what}{cause}; remove this checkpoint's folder, so that "
        "the one before is used"
    )
