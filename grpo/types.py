"""The records that travel through the house, and the legend of shapes.

    P  prompts of a step          G  samples of a prompt        B = P * G  rows
    T  tokens                     V  vocabulary                 C  trained completion tokens

A name carries its shape: `rewards_PG`, `logprobs_C`, `input_ids_T`. Tokens are made once, in `data`, and are never
re-tokenised: the trainer sees the ids and the logprobs that the engine returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]

EngineEvent = Literal["joined", "left", "failed"]
"""What becomes of an engine where they come and go; failed: it could not join."""
Lane = Literal["rollout", "trainer"]
"""A pool of devices, in pictures of what they do when: the engines, the ranks of the trainer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready to be sampled from.

    `id` names the row for seeds, logs and the exactly-once stream: "<source fingerprint>:<row>". `source` is the name
    of its source where there are several (`data.sources`), else "". `completion_ids` is what a supervised warm-up
    teaches behind it, end token included; nothing else knows it.
    """

    id: str
    question: str
    answer: str
    token_ids: tuple[int, ...]
    source: str = ""
    completion_ids: tuple[int, ...] = ()


Difficulty = Literal["easy", "hard"]
"""Of a prompt that is nearly always or nearly never right; what a curriculum skips it for (`data.curriculum`)."""
Skipped = tuple[str, Difficulty]
"""The id of a prompt whose turn a curriculum has skipped, and why."""
Outcome = tuple[str, int, int]
"""The id of a prompt that was sampled, how many of its completions were right, and how many there are."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next prompts of a stream, and those whose turn came before the last of them and was skipped."""

    prompts: list[Prompt]
    skipped: list[Skipped]


VersionSpans = tuple[tuple[int, int], ...]
"""(first output token, weight version that made the tokens from there on), in order; the first span begins at 0."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What followed one prompt, token by token: `output_ids` and `logprobs` (the sampler's, after temperature).

    `trained` is the mask of the output tokens that the policy wrote and learns from, as long as `output_ids`; None, for
    all of them, is a plain completion and travels light. The words of a tool or of a user between two turns are False:
    the model sees them, no loss does. C counts the tokens that are trained. `text` is as the model wrote it. `reward`
    and `advantage` are None until `rewards` and `advantages` have filled them in; `penalty` is added to the reward
    for the advantage only. A `masked` sample counts in its group and has nothing that is trained. `parts` are (weight,
    reward) of each of several rewards, where those are compared one by one.
    """

    prompt_id: str
    index: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: VersionSpans
    finish_reason: FinishReason
    text: str
    reward: float | None = None
    advantage: float | None = None
    trained: tuple[bool, ...] | None = None
    penalty: float = 0.0
    masked: bool = False
    parts: tuple[tuple[float, float], ...] = ()

    @property
    def oldest_version(self) -> int:
        """Of the weights that made it."""
        return min(version for _, version in self.versions)

    @property
    def newest_version(self) -> int:
        """Of the weights that made it."""
        return max(version for _, version in self.versions)

    @property
    def truncated(self) -> bool:
        """Whether the engine cut it off at the longest length that was allowed."""
        return self.finish_reason == "length"

    @property
    def trained_places(self) -> Sequence[int]:
        """Places in `output_ids` of the C tokens that are trained."""
        if self.trained is None or self.masked:
            return range(0 if self.masked else len(self.output_ids))
        return [place for place, trained in enumerate(self.trained) if trained]

    @property
    def trained_tokens(self) -> int:
        """C; 0 for a sample that is masked as a whole."""
        return 0 if self.masked else self.sampled_tokens

    @property
    def sampled_tokens(self) -> int:
        """Length of what the policy wrote, whether it is trained or not."""
        return len(self.output_ids) if self.trained is None else sum(self.trained)

    def lag(self, step: int) -> int:
        """Versions that its oldest weights are behind those that `step` trains: step s makes version s out of s - 1."""
        return step - 1 - self.oldest_version


@dataclass(frozen=True, slots=True)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def scored(self) -> bool:
        """Whether its samples have rewards; the rows of a supervised warm-up never do."""
        return all(sample.reward is not None for sample in self.samples)

    @property
    def rewards_G(self) -> list[float]:
        """The rewards, in the order of the samples; it is our own mistake to ask before scoring."""
        rewards = [sample.reward for sample in self.samples if sample.reward is not None]
        assert len(rewards) == len(self.samples), f"group {self.prompt.id} is not scored yet"
        return rewards

    @property
    def penalised_G(self) -> list[float]:
        """Rewards with their penalties: what advantages compare."""
        return [reward + sample.penalty for reward, sample in zip(self.rewards_G, self.samples, strict=True)]

    def right(self, pass_reward: float) -> int:
        """How many of its samples have at least that reward."""
        return sum(reward >= pass_reward for reward in self.rewards_G)

    @property
    def zero_variance(self) -> bool:
        """All that advantages compare is equal: the group teaches nothing."""
        return len(set(self.penalised_G)) == 1 and len({sample.parts for sample in self.samples}) == 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: the part of the configuration that training and evaluation choose differently."""

    samples_per_prompt: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the policy: Hugging Face name, shape, dtype ("bfloat16") and digest ("" before it is sent)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str = ""
    moves: bool = field(default=True, compare=False)
    """Whether training changes it."""

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
    seconds: "Stats" = field(default_factory=dict, compare=False)
    """What it took there, by part."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint: its name below the checkpoint's folder ("policy/config.json"), bytes, and digest."""

    name: str
    size: int
    sha256: str


Stats = dict[str, float]
"""Named numbers of one step; the names are keys of the catalogue in `observe/metrics.py`."""

Groups = Sequence[Group]
