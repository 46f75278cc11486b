"""A `Collector` without engines: the next rows with their own completions, and their loss where others sample."""

import math
from collections.abc import Callable, Mapping, Sequence

from grpo.interfaces import Batch, PromptStream, Trainer
from grpo.types import Group, Groups, Prompt, Sample, Stats


class SupervisedCollector:
    """Batches of a supervised warm-up. `held_out` may be empty: then nothing is evaluated."""

    def __init__(
        self, prompts: PromptStream, rows_per_step: int, trainer: Trainer, held_out: Sequence[Prompt] = ()
    ) -> None:
        self.prompts, self.rows_per_step, self.trainer, self.held_out = prompts, rows_per_step, trainer, held_out

    def next(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The next rows, in the order of the stream."""
        groups = taught(self.prompts.take(self.rows_per_step), step)
        return Batch(groups, samples_of(groups), {}, (), dict(self.prompts.state()))

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """The held-out rows and the loss of their completions."""
        groups = taught(self.held_out, step)
        return groups, self.trainer.evaluate(samples_of(groups))

    def state(self) -> Mapping[str, object]:
        """Where the stream of rows is."""
        return self.prompts.state()

    def restore(self, step: int, prompts: Mapping[str, object], drawn: bytes) -> None:
        """Goes back to after a step."""
        self.prompts.restore(prompts)

    def recorded(self, step: int) -> Mapping[str, object]:
        """Nothing."""
        return {}

    def drawn(self, step: int) -> Callable[[], bytes]:
        """Nothing."""
        return bytes

    def stop_ahead(self) -> None:
        """Nothing works ahead."""


def taught(prompts: Sequence[Prompt], step: int) -> list[Group]:
    """Each prompt with its completion as its only sample, for that step; nobody has sampled or scored it."""
    return [Group(prompt, (_sample(prompt, max(step - 1, 0)),)) for prompt in prompts]


def samples_of(groups: Groups) -> list[Sample]:
    """All samples, in order."""
    return [sample for group in groups for sample in group.samples]


def _sample(prompt: Prompt, version: int) -> Sample:
    ids = prompt.completion_ids
    unknown = (math.nan,) * len(ids)
    return Sample(prompt.id, 0, prompt.token_ids, ids, unknown, ((0, version),), "stop", "", advantage=1.0)
