"""The rewards that come with this program: what each reads, and how its answers vote. The one list of their names."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from grpo.config import Config, RewardFunction
from grpo.rewards.exact import answer_text, exact
from grpo.rewards.formula import reference_text, vote
from grpo.rewards.gsm8k import boxed, final_number, gsm8k, reference_number

AnswerOf = Callable[[str], Hashable | None]
"""From a completion to what it answers, equal for equal answers; None if it has no answer and does not vote."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A reward of ours. It runs in the controller if it is pure, linear in time and never raises, else in a worker."""

    function: Callable[[str, str, str], float] | None
    """(prompt, completion, answer) -> reward; None if workers run it."""
    reads: str
    """What it compares, a key of READS: a reference without one could only score 0, so its row is refused."""
    answer_of: AnswerOf
    """How the completions of a prompt vote for their answer (maj@k)."""
    worker: str = ""
    """"module:function" that the fenced workers run instead."""
    readable: str = ""
    """"module:function" that they run to see whether a reference can be read at all: 1.0 or 0.0."""


READS: dict[str, Callable[[str], object | None]] = {
    "number": reference_number,
    "text": answer_text,
    "expression": reference_text,
}
"""From a reference answer to what a reward finds in it; None if it finds nothing."""

WAY_OUT = {
    "number": "correct the row, use the reward math (expressions), exact (words) or one of your own (module:function)",
    "expression": "correct the row, use the reward exact for words, or one of your own (module:function)",
    "text": "correct the row, or use a reward of your own (module:function)",
}

BUILT_IN = {
    "gsm8k": BuiltIn(gsm8k, reads="number", answer_of=final_number),
    "boxed": BuiltIn(boxed, reads="number", answer_of=final_number),
    "exact": BuiltIn(exact, reads="text", answer_of=answer_text),
    "math": BuiltIn(
        None,
        reads="expression",
        answer_of=vote,
        worker="grpo.rewards.symbolic:math",
        readable="grpo.rewards.symbolic:readable",
    ),
}
"""By the name that a configuration gives. Add a reward here, or name it as module:function."""


def answer_problem(rewards: Iterable[RewardFunction], answer: str) -> str | None:
    """What is wrong with a reference answer that a built-in reward of the run cannot read; None if all can."""
    for name in dict.fromkeys(reward.name for reward in rewards if reward.name in BUILT_IN):
        kind = BUILT_IN[name].reads
        if READS[kind](answer) is None:
            return unreadable(name, answer)
    return None


def unreadable(name: str, answer: str) -> str:
    """What is said of a reference that this reward cannot read."""
    kind = BUILT_IN[name].reads
    return f"the reward {name} compares {kind}s, but this answer has none: {ascii(answer[-60:])}; {WAY_OUT[kind]}"


def answers_by_source(config: Config) -> dict[str, AnswerOf]:
    """`answers_of` the rewards of each of data.sources."""
    return {source.name: answers_of(config.rewards_of(source.name)) for source in config.data.sources}


def answers_of(rewards: Iterable[RewardFunction]) -> AnswerOf:
    """How answers vote in a run with these rewards: as the first built-in one says, else by their final numbers."""
    built_in = (BUILT_IN[reward.name].answer_of for reward in rewards if reward.name in BUILT_IN)
    return next(built_in, final_number)
