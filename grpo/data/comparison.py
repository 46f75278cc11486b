"""Prompts compared with each other: copies are counted, and the held-out ones are not those of the training."""

from collections.abc import Iterator, Sequence

from grpo.config import Config
from grpo.errors import ConfigError, DataError
from grpo.rewards.built_in import BUILT_IN, READS
from grpo.types import Prompt

SHOWN = 3


def check_copies(prompts: Sequence[Prompt], contents: Sequence[bytes], config: Config, section: str) -> Iterator[str]:
    """A sentence for prompts that are there more than once, and one for those of them with different answers.

    `contents` are digests of what each prompt asks. Raises DataError for different questions with one prompt.
    """
    first: dict[tuple[int, ...], int] = {}
    copies: list[str] = []
    conflicts: list[str] = []
    for place, prompt in enumerate(prompts):
        before = first.setdefault(prompt.token_ids, place)
        if before == place:
            continue
        pair = f"{_row(prompts[before])} = {_row(prompt)}"
        if contents[before] != contents[place]:
            raise DataError(
                f"{section}: different questions must give different prompts, but those of rows {pair} are equal; give "
                "a chat template or a tokenizer that keeps what they say, or correct the rows"
            )
        copies.append(pair)
        if _differ(prompts[before], prompt, config):
            conflicts.append(pair)
    if copies:
        yield f"{section}: {len(copies)} of {len(prompts)} prompts are copies of others ({_some(copies)})"
    if conflicts:
        yield (
            f"WARNING: {section}: {len(conflicts)} prompts are the same as others with ANOTHER ANSWER "
            f"({_some(conflicts)}); a completion cannot be right for both, correct or remove these rows"
        )


def check_held_out(
    train: Sequence[bytes], held_out: Sequence[bytes], prompts: Sequence[Prompt], where: str
) -> Iterator[str]:
    """A sentence on held-out prompts that are among those of the training.

    Raises ConfigError where all of them are: then nothing is held out, whatever their file is called.
    """
    seen = set(train)
    places = [place for place, content in enumerate(held_out) if content in seen]
    if places and len(places) == len(held_out):
        raise ConfigError(
            f"eval.source: held-out prompts must not be those of the training, but each of the {len(held_out)} of "
            f"{where} is a training prompt too; give others with eval.source or eval.split, or evaluate nothing with "
            "eval.prompts: 0"
        )
    if places:
        rows = [_row(prompts[place]) for place in places]
        yield f"eval: {len(places)} of {len(held_out)} held-out prompts are training prompts too (rows {_some(rows)})"


def _row(prompt: Prompt) -> str:
    return f"{prompt.source}:{prompt.id.rpartition(':')[2]}".removeprefix(":")


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:SHOWN]) + ", ..." * (len(texts) > SHOWN)


def _differ(one: Prompt, other: Prompt, config: Config) -> bool:
    """Whether a reward of either reads something else in the two answers; one that is not built in reads the text."""
    names = {reward.name for prompt in (one, other) for reward in config.rewards_of(prompt.source)}
    reads = [READS[BUILT_IN[name].reads] if name in BUILT_IN else str.strip for name in names]
    return one.answer != other.answer and any(read(one.answer) != read(other.answer) for read in reads)
