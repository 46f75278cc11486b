"""What built-in rewards declare, and who asks."""

from decimal import Decimal

import pytest

from grpo.config import RewardFunction
from grpo.rewards import built_in
from grpo.rewards.built_in import BUILT_IN, READS, BuiltIn, answer_problem, answers_of


def rewards(*names: str) -> list[RewardFunction]:
    return [RewardFunction(function=name) for name in names]


def test_every_reward_reads_something_that_is_known() -> None:
    assert {row.reads for row in BUILT_IN.values()} <= set(READS)
    assert list(BUILT_IN) == ["gsm8k", "boxed", "exact", "math"]


@pytest.mark.parametrize(
    ("names", "answer", "problem"),
    [
        (("gsm8k",), "72", None),
        (("gsm8k",), "in words", "the reward gsm8k compares numbers, but this answer has none: 'in words'"),
        (("boxed", "exact"), "in words", "the reward boxed compares numbers"),
        (("exact",), "in words", None),
        (("exact",), "#### ", "the reward exact compares texts, but this answer has none"),
        (("math",), "in words", None),
        (("math",), "#### ", "the reward math compares expressions, but this answer has none"),
        (("m:f",), "", None),
        (("m:f", "gsm8k"), "words", "the reward gsm8k"),
    ],
)
def test_an_answer_that_a_reward_cannot_read_is_named(names: tuple[str, ...], answer: str, problem: str | None) -> None:
    found = answer_problem(rewards(*names), answer)
    assert found is None if problem is None else found is not None and found.startswith(problem)


def test_how_answers_vote() -> None:
    assert answers_of(rewards("gsm8k"))("so #### 7") == Decimal(7)
    assert answers_of(rewards("boxed"))("so \\boxed{7}") == Decimal(7)
    assert answers_of(rewards("m:f", "exact"))("so #### Seven") == "seven"
    assert answers_of(rewards("m:f"))("so #### 7") == Decimal(7)
    assert answers_of(rewards("m:f"))("seven") is None


def test_a_new_reward_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    own = BuiltIn(lambda prompt, completion, answer: float(completion == answer), reads="text", answer_of=len)
    monkeypatch.setitem(built_in.BUILT_IN, "same", own)
    assert answer_problem(rewards("same"), "#### ") is not None
    assert answers_of(rewards("same"))("abc") == 3
