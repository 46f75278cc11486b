"""A model that is not finite is never saved: such a checkpoint would push out a good one."""

from collections.abc import Mapping, Sequence

import torch

from grpo.errors import NonFiniteError
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed_private import Shards


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are: smallest and largest tell, without a mask as large as the tensor."""
    return tensor.numel() == 0 or bool(finite_flag(tensor))


def finite_flag(tensor: torch.Tensor) -> torch.Tensor:
    """The same as a tensor on its device: nobody waits for it here."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def not_true(flags: dict[str, bool | torch.Tensor]) -> list[str]:
    """Names of flags that are not, with one wait for a device. Those of what lies on the host are known at once."""
    later = {name: flag for name, flag in flags.items() if isinstance(flag, torch.Tensor) and not on_host(flag)}
    found = torch.stack(list(later.values())).tolist() if later else []
    known = flags | dict(zip(later, found, strict=True))
    return [name for name, flag in known.items() if not flag]


def on_host(tensor: torch.Tensor) -> bool:
    """Whether it lies in the host's memory."""
    return tensor.device.type == "cpu"


def not_finite(names: Sequence[str]) -> NonFiniteError | None:
    """The error about tensors, unless there are none."""
    if not names:
        return None
    return NonFiniteError(
        f"only a finite model is saved, but {len(names)} tensors hold NaN or infinity, the first is {names[0]}; resume "
        "from the checkpoint before, with a lower train.learning_rate"
    )


def check_finite(params: Mapping[str, torch.nn.Parameter], shards: Shards) -> None:
    """Raises NonFiniteError, on all ranks alike, naming a tensor of any rank that is not finite. A collective."""
    bad = [
        f"{kind} of {name}"
        for name, param in params.items()
        for kind, tensor in {"weight": param.data, **shards.of(param).views}.items()
        if not is_finite(tensor)
    ]
    raise_on_all_ranks(not_finite(bad))
