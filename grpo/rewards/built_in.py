"""The rewards that come with this program: what each reads, and how its answers vote. The one list of their names."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from grpo.config import RewardFunction
from grpo.rewards.exact import answer_text, exact
from grpo.rewards.gsm8k import boxed, final_number, gsm8k, reference_number

AnswerOf = Callable[[str], Hashable | None]
"""From a completion to what it answers, equal for equal answers; None if it has no answer and does not vote."""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A reward of ours. It is pure, linear in time and never raises, so it runs in the controller's process."""

    function: Callable[[str, str, str], float]
    """(prompt, completion, answer) -> reward."""
    reads: str
    """What it compares, a key of READS: a reference without one could only score 0, so its row is refused."""
    answer_of: AnswerOf
    """How the completions of a prompt vote for their answer (maj@k)."""


READS: dict[str, Callable[[str], object | None]] = {"number": reference_number, "text": answer_text}
"""From a reference answer to what a reward finds in it; None if it finds nothing."""

WAY_OUT = {
    "number": "correct the row, use the reward exact for words, or one of your own (module:function)",
    "text": "correct the row, or use a reward of your own (module:function)",
}

BUILT_IN = {
    "gsm8k": BuiltIn(gsm8k, reads="number", answer_of=final_number),
    "boxed": BuiltIn(boxed, reads="number", answer_of=final_number),
    "exact": BuiltIn(exact, reads="text", answer_of=answer_text),
}
"""By the name that a configuration gives. Add a reward here, or name it as module:function."""


def answer_problem(rewards: Iterable[RewardFunction], answer: str) -> str | None:
    """What is wrong with a reference answer that a built-in reward of the run cannot read; None if all can."""
    for name in dict.fromkeys(reward.name for reward in rewards if reward.name in BUILT_IN):
        kind = BUILT_IN[name].reads
        if READS[kind](answer) is None:
            return (
                f"the reward {name} compares {kind}s, but this answer has none: {ascii(answer[-60:])}; {WAY_OUT[kind]}"
            )
    return None


def answers_of(rewards: Iterable[RewardFunction]) -> AnswerOf:
    """How answers vote in a run with these rewards: as the first built-in one says, else by their final numbers."""
    built_in = (BUILT_IN[reward.name].answer_of for reward in rewards if reward.name in BUILT_IN)
    return next(built_in, final_number)
