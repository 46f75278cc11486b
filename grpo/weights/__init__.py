"""One version of the policy's weights, from trainer rank 0 to every engine worker: sent, received, compared, proved.

Importing this room does not import torch: the driver compares manifests without it.
"""

from grpo.weights.manifest import verify
from grpo.weights.self_test import check_adapter_sent, check_self_test
from grpo.weights.transport import Transport, choose_backend, make_sender, make_transport, seconds_of

__all__ = [
    "Transport",
    "check_adapter_sent",
    "check_self_test",
    "choose_backend",
    "make_sender",
    "make_transport",
    "seconds_of",
    "verify",
]
