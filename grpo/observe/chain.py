"""The chain of the books: how a row continues it, what seals it, and digests of what a row is about."""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from grpo.errors import CheckpointError
from grpo.store.files import json_object, open_regular
from grpo.types import Sample, VersionSpans

SEAL = "books.json"
"""Where a checkpoint says how far the books went; among its attachments."""
START = "0" * 64
DIGITS = 16
LINK = b', "chain": "'
LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class Seal:
    """How far the books went: whole rows, their bytes, and the chain of the last one."""

    rows: int = 0
    size: int = 0
    chain: str = START

    def after(self, line: bytes) -> "Seal":
        """With one line more, whatever that says of its own chain."""
        body = line.rpartition(LINK)[0]
        return Seal(self.rows + 1, self.size + len(line), _link(self.chain, body))

    def written(self, row: Mapping[str, object]) -> bytes:
        """The line of a row that comes next."""
        body = json.dumps(row, allow_nan=False).encode()[:-1]
        return body + LINK + _link(self.chain, body).encode() + b'"}\n'

    @classmethod
    def read(cls, content: bytes) -> "Seal | None":
        """What a checkpoint says; None if it is damaged."""
        said = json_object(content)
        rows, size, chain = said.get("rows"), said.get("size"), said.get("chain")
        if not (type(rows) is int and type(size) is int and rows >= 0 and size >= 0 and isinstance(chain, str)):
            return None
        return cls(rows, size, chain)


def _link(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()


def short(content: bytes) -> str:
    """16 digits of sha256."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def sample_digest(sample: Sample) -> str:
    """Of its tokens, their logprobs and its reward."""
    return content_digest(sample.output_ids, sample.logprobs, sample.reward)


def content_digest(output_ids: Sequence[int], logprobs: Sequence[float], reward: float | None) -> str:
    """The same, of a sample's parts. Raises TypeError, OverflowError for what no sample has."""
    scores = array("d", [] if reward is None else [reward])
    parts = array("q", [len(output_ids), *output_ids]), array("d", logprobs), scores
    if sys.byteorder == "big":
        for part in parts:
            part.byteswap()
    return short(b"".join(part.tobytes() for part in parts))


def packed(spans: Iterable[VersionSpans]) -> list[list[object]]:
    """Versions of samples, in order; neighbours of the same ones are counted."""
    return [[len(list(some)), [number for span in each for number in span]] for each, some in groupby(spans)]


def lines_of(path: Path) -> Iterator[bytes]:
    """Whole lines; the half line of a killed run is left out."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n"):
                if len(line) < LONGEST_LINE:
                    return
                raise CheckpointError(f"{path}: a row must be shorter than {LONGEST_LINE} bytes; take the file away")
            yield line
