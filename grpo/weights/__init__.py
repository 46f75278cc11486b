"""One version of the policy's weights, from trainer rank 0 to every engine worker: sent, received, compared, proved.

Importing this room does not import torch: the driver compares manifests without it.
"""

from grpo.config import Config
from grpo.weights.manifest import verify
from grpo.weights.self_test import check_self_test
from grpo.weights.sender import Sender, Transport

__all__ = ["Sender", "Transport", "check_self_test", "make_transport", "verify"]


def make_transport(config: Config, device: str, host: str, port: int, rank: int, world_size: int) -> Transport:
    """Joins the transfer group at `host:port`: rank 0 is the trainer's rank 0, the other ranks are engine workers.

    Blocks until all ranks have joined and a random number has travelled between them. `device` is "cpu" or "cuda".
    Raises: ClusterError if they do not join within `deadlines.sync`; WeightSyncError if the group moves no data.
    """
    from grpo.weights.transport import GroupTransport, choose_backend

    backend = choose_backend(config, device)
    return GroupTransport(backend, device, host, port, rank, world_size, seconds=config.deadlines.sync)
