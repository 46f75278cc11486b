"""The random generators of one rank as JSON: Python, NumPy, torch on the CPU and on the rank's GPU."""

import base64
import hashlib
import json
import random
from typing import Any

import numpy
import torch


def capture(device: torch.device) -> str:
    """The state of every generator."""
    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = numpy_state
    return json.dumps(
        {
            "python": [version, list(words), gauss],
            "numpy": [kind, keys.tolist(), position, has_gauss, cached],
            "torch": _text(torch.get_rng_state()),
            "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        }
    )


def restore(text: str, device: torch.device) -> None:
    """Sets every generator. A GPU whose state was not captured keeps its own. Raises ValueError and the like."""
    state: dict[str, Any] = json.loads(text)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def derive(text: str, rank: int) -> None:
    """Seeds every generator of a rank that has no state of its own: the same for the same state of rank 0."""
    seed = int.from_bytes(hashlib.sha256(f"{rank}/{text}".encode()).digest()[:4], "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy(force=True).tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
