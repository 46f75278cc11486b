"""Published versions: copies of the weights that travel to the engines while the next steps change the live ones.

The training thread publishes, one other thread sends. A copy stays until no engine can need it; its memory then takes
the next one, but never while it still travels.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from grpo.errors import WeightSyncError

ROOM = 0.9
"""Share of a GPU's memory that copies and the largest step so far may fill together; fragments take some."""
Copy = dict[str, torch.Tensor]


class PublishedVersions:
    """The copies that rank 0 holds: on the training device where a step leaves room for them, else in host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[int, Copy] = {}
        self._travelling: list[Copy] = []
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def publish(
        self, version: int, oldest: int, tensors: Iterable[tuple[str, torch.Tensor]], size: int, stepped: bool
    ) -> int:
        """Copies tensors of `size` bytes as `version`, forgets those below `oldest`; bytes of all copies that are left.

        Only in the training thread. `stepped` says that a step was made, so that its peak of memory is known.
        """
        copy = self._forget(oldest, version)
        on_device = self.device.type == "cpu" or (stepped and fits(size, self.device))
        if on_device and any(tensor.device != self.device for tensor in copy.values()):
            copy = {}  # of the time when nobody knew what a step needs
        goals, sources = [], []
        for name, tensor in tensors:
            if name not in copy:
                where = self.device if on_device else torch.device("cpu")
                copy[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=where, pin_memory=not on_device)
            if isinstance(tensors, list):
                goals.append(copy[name])
                sources.append(tensor)
            else:  # it may be gone when the next comes
                copy[name].copy_(tensor, non_blocking=True)
        if goals:
            torch._foreach_copy_(goals, sources, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        with self._lock:
            self._held[version] = copy
            return sum(tensor.nbytes for each in [*self._held.values(), *self._gone()] for tensor in each.values())

    @contextmanager
    def sending(self, version: int) -> Iterator[Iterable[tuple[str, torch.Tensor]]]:
        """The tensors of a version, on the training device, for a thread beside the training one; a list lies there.

        On the CPU that thread computes with one core, on a GPU in a stream of its own. Raises WeightSyncError if the
        version is not held.
        """
        with self._lock:
            if version not in self._held:
                raise WeightSyncError(
                    f"only a published version is sent, but {version} is none of {sorted(self._held)}; start the run "
                    "again"
                )
            copy = self._held[version]
            self._travelling.append(copy)
        try:
            with ExitStack() as stack:
                if self.device.type == "cuda":
                    self._stream = self._stream or torch.cuda.Stream(self.device)
                    stack.callback(self._stream.synchronize)
                    stack.enter_context(torch.cuda.stream(self._stream))
                else:
                    stay_aside()
                here = all(tensor.device == self.device for tensor in copy.values())
                brought = ((name, tensor.to(self.device, non_blocking=True)) for name, tensor in copy.items())
                yield list(copy.items()) if here else brought
        finally:
            with self._lock:
                self._travelling.remove(copy)

    def _forget(self, oldest: int, version: int) -> Copy:
        """What the next copy may overwrite: one that is forgotten and does not travel, or nothing."""
        with self._lock:
            old = [self._held.pop(held) for held in sorted(self._held) if held < oldest or held == version]
            idle = [copy for copy in old if not any(copy is other for other in self._travelling)]
            return idle[0] if idle else {}

    def _gone(self) -> list[Copy]:
        """Forgotten, but still travelling."""
        return [copy for copy in self._travelling if not any(copy is held for held in self._held.values())]


def fits(size: int, device: torch.device) -> bool:
    """Whether the GPU has room for so many bytes beside the largest step so far."""
    free, _ = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device)
    held = torch.cuda.max_memory_allocated(device)
    return held + size < ROOM * mine


def stay_aside() -> None:
    """This thread computes with one core: the others are those of the thread that trains, which keeps its number."""
    torch.set_num_threads(1)
