"""The records that travel through the house, and the legend of shapes.

    P  prompts of a step          G  samples of a prompt        B = P * G  rows
    T  tokens                     V  vocabulary                 C  completion tokens

A name carries its shape: `rewards_PG`, `logprobs_C`, `input_ids_T`. Tokens are made once, in `data`, and are never
re-tokenised: the trainer sees the ids and the logprobs that the engine returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready to be sampled from.

    `id` names the row for seeds, logs and the exactly-once stream: "<source fingerprint>:<row>".
    """

    id: str
    question: str
    answer: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one prompt; `output_ids` and `logprobs` have length C.

    The logprobs are the sampler's, after temperature.

    `version` is the weight version of the engine when it made the first token of the completion (the oldest one).
    `reward` and `advantage` are None until `rewards` and `advantages` have filled them in.
    """

    prompt_id: str
    index: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version: int
    finish_reason: FinishReason
    text: str
    reward: float | None = None
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def rewards_G(self) -> list[float]:
        """The rewards, in the order of the samples; it is our own mistake to ask before scoring."""
        rewards = [sample.reward for sample in self.samples if sample.reward is not None]
        assert len(rewards) == len(self.samples), f"group {self.prompt.id} is not scored yet"
        return rewards

    @property
    def zero_variance(self) -> bool:
        """All rewards are equal: the group teaches nothing."""
        return len(set(self.rewards_G)) == 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: the part of the configuration that training and evaluation choose differently."""

    samples_per_prompt: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the policy: Hugging Face name, shape, dtype ("bfloat16") and digest ("" before it is sent)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""

    @property
    def numel(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def nbytes(self) -> int:
        """Its size on the way to the engines. Raises KeyError for a dtype that is never sent."""
        return self.numel * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one side of a weight sync sent or received, in order."""

    version: int
    records: tuple[TensorRecord, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: its name below the checkpoint's folder ("policy/config.json"), bytes, and digest."""

    name: str
    size: int
    sha256: str


Stats = dict[str, float]
"""Named numbers of one step; the names are keys of the catalogue in `observe/metrics.py`."""

Groups = Sequence[Group]
