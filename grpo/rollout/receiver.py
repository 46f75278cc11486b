"""What runs inside every vLLM worker: takes the policy's weights and says what it took.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls it by name (`collective_rpc`), with plain data.
The tensors go through vLLM's layerwise reload, which also fuses, shards and packs them as at start-up; or, where that
only puts each somewhere, to the places that it gave the first ones (`places.py`).
"""

import contextlib
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.utils.nccl import unpinned_nccl_env

from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.rollout.places import Places, Watch
from grpo.rollout.shadow import Announced, Answer, Expected, Shadow
from grpo.rollout.vllm_private import START_SECONDS, begin_reload, finish_reload, load_tensor, not_loaded
from grpo.types import Stats, TensorRecord
from grpo.weights import Transport, make_transport, seconds_of


class Receiver:
    """A worker's end of the weight transfer. The attributes without a value are the worker's own."""

    rank: int
    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    transport: Transport | None = None
    shadow: Shadow | None = None
    places: Places | None = None
    placeless = ""
    """Why there are no places; as long as both are empty, none were looked for."""
    packs = True
    """Whether vLLM's CPU build computes with packed copies, made by kernels that nobody sees: then it has no places."""
    sharing = 1
    """Engines that share the GPU, at most."""

    def ping(self) -> None:
        """Does nothing: its answer shows that the worker still takes calls between two steps."""

    def start_seconds(self) -> dict[str, float]:
        """What this worker's start took, by phase."""
        return dict(START_SECONDS)

    def join_transfer(self, config: str, url: str, rank_offset: int, world_size: int, secret: str) -> str:
        """Joins a transfer group as rank `rank_offset` plus this worker's rank, leaving the one before.

        `config` is the run's, as JSON. What makes the transfer one of no use is returned: of several workers that all
        raise vLLM hears one, and takes what the next says for the answer to the next call.
        """
        parsed = Config.model_validate_json(config)
        self.shadow, self.sharing = None, parsed.rollout.sharing
        if self.transport is not None:
            self.transport.close()
            self.transport = None
        with (
            unpinned_nccl_env()
        ):  # NCCL settings that vLLM makes for its own groups would make the trainer wait for ever
            rank = rank_offset + self.rank
            try:
                self.transport = make_transport(parsed, self.device.type, url, rank, world_size, secret)
            except WeightSyncError as error:
                return str(error)
        return ""

    def receive_tensors(self, expected: Expected) -> Answer:
        """Loads what the trainer sends. `expected` is [[name, shape, dtype], ...] as the trainer announced it.

        Returns what arrived, in order, what is wrong with it, and what it took, by part; with anything wrong the model
        must not be used. Reads to the end of the stream whatever is wrong, so that no other rank waits for this one. If
        it cannot, it leaves the group and raises, and the model is in pieces.
        """
        assert self.transport is not None, "receive_tensors before join_transfer"
        self.shadow = None
        began = time.perf_counter()
        announced = Announced(expected)
        try:
            if self._placed(expected):
                problems = self._receive_in_place(self.transport, announced)
            else:
                problems = self._load(self.transport.receive(), announced)
        except BaseException:
            self.transport.close()
            raise
        return announced.received, problems, parts(self.transport, time.perf_counter() - began)

    def _placed(self, expected: Expected) -> bool:
        """Whether what is expected, and nothing else, has a place in the model."""
        return self.places is not None and {name for name, *_ in expected} == self.places.views.keys()

    def _receive_in_place(self, transport: Transport, announced: Announced) -> list[str]:
        """To where it belongs, without a copy on the way; the digests are those of the model's own memory."""
        assert self.places is not None
        problems = []
        for record, tensor in transport.receive(self.places.of):
            odd = announced.problem(record)
            home = self.places.of(record.name, record.shape, tensor.dtype)
            problems += odd or ([] if tensor is home else [f"{record.name} has not come to its place"])
        return problems + announced.left()

    def receive_ahead(self, version: int, expected: Expected) -> None:
        """Begins to take what the trainer sends into a copy beside the model; `received_ahead` tells of its end."""
        assert self.transport is not None, "receive_ahead before join_transfer"
        assert self.shadow is None or self.shadow.ended, "one version is received at a time"
        self.shadow = Shadow(version, self.transport, expected, self.device, self.sharing)

    def received_ahead(self) -> Answer | None:
        """What `receive_tensors` returns, of the copy; None as long as something is to come. Raises what broke it."""
        assert self.shadow is not None, "nothing is received"
        return self.shadow.answer() if self.shadow.ended else None

    def load_ahead(self, version: int) -> list[str]:
        """Loads the copy, which must be of this version; what is wrong. Then the model must not be used."""
        shadow, self.shadow = self.shadow, None
        if shadow is None:
            return [f"there is no copy of version {version}"]
        try:
            if self.places is not None and self._placed(shadow.expected):
                return self.places.fill(shadow.all(version))
            return self._load(shadow.take(version), None)
        except ValueError as error:
            return [str(error)]

    def _load(self, tensors: Iterable[tuple[TensorRecord, torch.Tensor]], announced: Announced | None) -> list[str]:
        """Through vLLM's reload; what is wrong. Tensors that were not announced are not loaded."""
        model = self.model_runner.get_model()
        problems: list[str] = []
        watch = None if self.places or self.placeless or (self.device.type == "cpu" and self.packs) else Watch()
        watched: AbstractContextManager[object] = watch or contextlib.nullcontext()
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            with watched:
                begin_reload(model, self.device)
            try:
                for record, tensor in tensors:
                    odd = announced.problem(record) if announced else []
                    if watch:
                        watch.expect(record, tensor)
                    with watched:
                        problems += odd or load_tensor(model, record, tensor)
                problems += (announced.left() if announced else []) + not_loaded(model)
            finally:
                with watched:
                    finish_reload(model, self.model_config, self.device)
        if watch and not problems:
            self._learn(watch, model)
        return problems

    def _learn(self, watch: Watch, model: Any) -> None:
        """Where the next version belongs. Kernels of vLLM's own may read weights without being seen."""
        if self.model_config.quantization is not None:
            watch.reason = "the model is quantised"
        self.places = watch.places(model)
        self.placeless = watch.reason


def parts(transport: Transport, whole: float) -> Stats:
    """Seconds of a transfer by part; what is left is "load"."""
    seconds = seconds_of(transport)
    return seconds | {"load": max(0.0, whole - sum(seconds.values()))}
