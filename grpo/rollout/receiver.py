"""What runs inside every vLLM worker: takes the policy's weights and says what it took.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls it by name (`collective_rpc`), with plain data.
The tensors go through vLLM's layerwise reload, which also fuses, shards and packs them as at start-up.
"""

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.utils.nccl import unpinned_nccl_env

from grpo.config import Config
from grpo.rollout.vllm_private import begin_reload, finish_reload, load_tensor, not_loaded
from grpo.weights import Transport, make_transport

PlainRecord = tuple[str, tuple[int, ...], str, str]
"""Name, shape, dtype, digest: what crosses the border between vLLM's processes."""


class Receiver:
    """A worker's end of the weight transfer. The attributes without a value are the worker's own."""

    rank: int
    device: torch.device
    model_runner: Any
    model_config: Any
    vllm_config: Any
    transport: Transport | None = None

    def ping(self) -> None:
        """Does nothing: its answer shows that the worker still takes calls between two steps."""

    def join_transfer(self, config: str, url: str, rank_offset: int, world_size: int, secret: str) -> None:
        """Joins a transfer group as rank `rank_offset` plus this worker's rank, leaving the one before.

        `config` is the run's, as JSON.
        """
        parsed = Config.model_validate_json(config)
        if self.transport is not None:
            self.transport.close()
            self.transport = None
        with (
            unpinned_nccl_env()
        ):  # NCCL settings that vLLM makes for its own groups would make the trainer wait for ever
            rank = rank_offset + self.rank
            self.transport = make_transport(parsed, self.device.type, url, rank, world_size, secret)

    def receive_tensors(self, expected: list[tuple[str, list[int], str]]) -> tuple[list[PlainRecord], list[str]]:
        """Loads what the trainer sends. `expected` is [[name, shape, dtype], ...] as the trainer announced it.

        Returns what arrived, in order, and what is wrong with it; with anything wrong the model must not be used. Reads
        to the end of the stream whatever is wrong, so that no other rank waits for this one. If it cannot, it leaves
        the group and raises, and the model is in pieces.
        """
        assert self.transport is not None, "receive_tensors before join_transfer"
        missing = {name: (tuple(shape), dtype) for name, shape, dtype in expected}
        model = self.model_runner.get_model()
        received: list[PlainRecord] = []
        problems: list[str] = []
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            begin_reload(model, self.device)
            try:
                for record, tensor in self.transport.receive():
                    received.append((record.name, record.shape, record.dtype, record.digest))
                    if missing.pop(record.name, None) == (record.shape, record.dtype):
                        problems += load_tensor(model, record, tensor)
                    else:
                        problems.append(f"{record.name} {list(record.shape)} {record.dtype} was not announced")
                problems += [f"{name} was announced and not sent" for name in missing] + not_loaded(model)
            except BaseException:
                self.transport.close()
                raise
            finally:
                finish_reload(model, self.model_config, self.device)
        return received, problems
