"""What runs inside every vLLM worker: takes the policy's weights and says what it took.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls it by name (`collective_rpc`), with plain data.
The tensors go through vLLM's layerwise reload, which also fuses, shards and packs them as at start-up.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.utils.nccl import unpinned_nccl_env

from grpo.config import Config
from grpo.rollout.shadow import Announced, Expected, PlainRecord, Shadow
from grpo.rollout.vllm_private import START_SECONDS, begin_reload, finish_reload, load_tensor, not_loaded
from grpo.types import TensorRecord
from grpo.weights import Transport, make_transport


class Receiver:
    """A worker's end of the weight transfer. The attributes without a value are the worker's own."""

    rank: int
    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    transport: Transport | None = None
    shadow: Shadow | None = None
    sharing = 1
    """Engines that share the GPU, at most."""

    def ping(self) -> None:
        """Does nothing: its answer shows that the worker still takes calls between two steps."""

    def start_seconds(self) -> dict[str, float]:
        """What this worker's start took, by phase."""
        return dict(START_SECONDS)

    def join_transfer(self, config: str, url: str, rank_offset: int, world_size: int, secret: str) -> None:
        """Joins a transfer group as rank `rank_offset` plus this worker's rank, leaving the one before.

        `config` is the run's, as JSON.
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
            self.transport = make_transport(parsed, self.device.type, url, rank, world_size, secret)

    def receive_tensors(self, expected: Expected) -> tuple[list[PlainRecord], list[str]]:
        """Loads what the trainer sends. `expected` is [[name, shape, dtype], ...] as the trainer announced it.

        Returns what arrived, in order, and what is wrong with it; with anything wrong the model must not be used. Reads
        to the end of the stream whatever is wrong, so that no other rank waits for this one. If it cannot, it leaves
        the group and raises, and the model is in pieces.
        """
        assert self.transport is not None, "receive_tensors before join_transfer"
        self.shadow = None
        announced = Announced(expected)
        try:
            problems = self._load(self.transport.receive(), announced)
        except BaseException:
            self.transport.close()
            raise
        return announced.received, problems

    def receive_ahead(self, version: int, expected: Expected) -> None:
        """Begins to take what the trainer sends into a copy beside the model; `received_ahead` tells of its end."""
        assert self.transport is not None, "receive_ahead before join_transfer"
        assert self.shadow is None or self.shadow.ended, "one version is received at a time"
        self.shadow = Shadow(version, self.transport, expected, self.device, self.sharing)

    def received_ahead(self) -> tuple[list[PlainRecord], list[str]] | None:
        """What `receive_tensors` returns, of the copy; None as long as something is to come. Raises what broke it."""
        assert self.shadow is not None, "nothing is received"
        return self.shadow.answer() if self.shadow.ended else None

    def load_ahead(self, version: int) -> list[str]:
        """Loads the copy, which must be of this version; what is wrong. Then the model must not be used."""
        shadow, self.shadow = self.shadow, None
        if shadow is None:
            return [f"there is no copy of version {version}"]
        try:
            return self._load(shadow.take(version), None)
        except ValueError as error:
            return [str(error)]

    def _load(self, tensors: Iterable[tuple[TensorRecord, torch.Tensor]], announced: Announced | None) -> list[str]:
        """Through vLLM's reload; what is wrong. Tensors that were not announced are not loaded."""
        model = self.model_runner.get_model()
        problems: list[str] = []
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            begin_reload(model, self.device)
            try:
                for record, tensor in tensors:
                    odd = announced.problem(record) if announced else []
                    problems += odd or load_tensor(model, record, tensor)
                problems += (announced.left() if announced else []) + not_loaded(model)
            finally:
                finish_reload(model, self.model_config, self.device)
        return problems
