"""Completions of forced lengths, the same for every system: inside vLLM, which all of them sample with.

The environment variable BENCH_LENGTHS names a JSON file: {"samples": 8, "rules": {"512": [phase, ...]}}. A rule is for
the requests of one `max_tokens`; each of its phases is {"batches": 6, "tokens": 200}, or {"batches": 6, "rows":
{prompt: [8 lengths]}}, and the last one goes on for ever. A batch asks for each prompt `samples` times. End tokens do
not end such a request. Systems, their requests and what is computed for a token stay as they are.

A .pth file of the benchmark's environment (`environment.py`) imports this module when Python starts. It stands alone,
and does nothing without the variable.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "BENCH_LENGTHS"
PATCHED = "vllm.v1.request"


def key_of(prompt_ids: Sequence[int]) -> str:
    """A prompt's name in a rule."""
    return f"{zlib.crc32(','.join(map(str, prompt_ids)).encode()):08x}"


class Lengths:
    """The rules of one file. Requests of all processes that read it are counted together."""

    def __init__(self, file: Path) -> None:
        said = json.loads(file.read_text())
        self.samples: int = said["samples"]
        self.rules: dict[str, list[dict[str, Any]]] = said["rules"]
        self.counts = file.with_suffix(".counts")
        self.counts.mkdir(exist_ok=True)

    def of(self, max_tokens: int, prompt_ids: Sequence[int]) -> int | None:
        """Tokens of the next request for that prompt; None if no rule is for it."""
        phases = self.rules.get(str(max_tokens))
        if phases is None:
            return None
        name = key_of(prompt_ids)
        batch, sample = divmod(self._next(f"{max_tokens}-{name}"), self.samples)
        for phase in phases:
            batch -= phase["batches"]
            if batch < 0:
                break
        rows: dict[str, list[int]] = phase.get("rows", {})
        length: int = rows[name][sample] if rows else phase["tokens"]
        return length

    def _next(self, name: str) -> int:
        """How many of that name came before: appending to a file is atomic, whichever process does it."""
        counter = os.open(self.counts / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(counter, b".")
            return os.lseek(counter, 0, os.SEEK_CUR) - 1
        finally:
            os.close(counter)


def force(module: ModuleType, lengths: Lengths) -> None:
    """Lets each request that a rule is for end at its length, and nowhere else."""
    request: Any = module.Request
    original = request.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        params = self.sampling_params
        length = lengths.of(params.max_tokens, self.prompt_token_ids) if params is not None else None
        if length is not None:
            self.max_tokens = length
            params.ignore_eos, params.stop_token_ids, params._eos_token_id = True, [], None

    request.__init__ = begin


class Finder(importlib.abc.MetaPathFinder):
    """Forces lengths as soon as vLLM's module of requests has been loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        loaded = spec.loader.exec_module

        def load(module: ModuleType) -> None:
            loaded(module)
            force(module, Lengths(self.file))

        spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec


if VARIABLE in os.environ:
    sys.meta_path.insert(0, Finder(Path(os.environ[VARIABLE])))
