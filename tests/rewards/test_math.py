"""The reward `math`: what it takes for an answer, what it takes for equal, and its workers."""

import json
from pathlib import Path

import pytest

from grpo.errors import DataError
from grpo.rewards import symbolic
from grpo.rewards.built_in import answers_of
from grpo.rewards.formula import answers, reference, vote
from grpo.rewards.registry import RewardScorer
from grpo.types import Prompt
from tests.reward_helpers import configured, failed_kinds, grouped

ROWS = [json.loads(line) for line in (Path(__file__).parent / "corpus" / "verdicts.jsonl").read_text().splitlines()]

EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "50\\%"),
    ("\\frac12", "\\dfrac{2}{4}"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("[1,2)", "[1, 2)"),
    ("(-\\infty,\\infty)", "\\mathbb{R}"),
    ("(1,2)", "1<x<2"),
    ("x\\in[1,2]", "[1,2]"),
    ("\\{1,2,3\\}", "\\{3,2,1\\}"),
    ("2,-2", "-2 \\text{ and } 2"),
    ("2,-2", "\\pm 2"),
    ("5,7", "7 \\text{ or } 5"),
    ("5, 7", "7,5"),
    ("100 \\text{ or } 200", "200, 100"),
    ("1,2,3", "3, 1, 2"),
    ("1,000 \\text{ and } 2", "2, 1000"),
    ("1+\\sqrt2, 1-\\sqrt2", "1 \\pm \\sqrt{2}"),
    ("x=2,x=-2", "-2 \\text{ or } 2"),
    ("12\\text{ cm}", "12"),
    ("\\$5.00", "5"),
    ("12,345", "12345"),
    ("1.5\\times10^3", "1500"),
    ("10", "\\binom{5}{2}"),
    ("x\\ge 3", "3\\le x"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}"),
    ("12 hours 30 minutes", "12\\text{ hours }30\\text{ minutes}"),
]
UNEQUAL = [
    ("\\frac{1}{2}", "2"),
    ("2\\pi", "2"),
    ("[1,2)", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("(2,3)", "\\{2,3\\}"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("2,-2", "2"),
    ("2", "2 \\text{ or } -2"),
    ("2,2", "2,3"),
    ("12", "12 hours 30 minutes"),
    ("5", "5 and a half"),
    ("x\\ge 3", "x>3"),
    ("\\text{Evelyn}", "Briana"),
    ("1", "\\frac{"),
    ("1", "\\text{none}"),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one: str, other: str) -> None:
    assert symbolic.same(one, other) and symbolic.same(other, one)


@pytest.mark.parametrize(("one", "other"), UNEQUAL)
def test_unequal(one: str, other: str) -> None:
    assert not symbolic.same(one, other) and not symbolic.same(other, one)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['family']} {ascii(row['completion'])[-40:]}")
def test_the_verdict_is_that_of_a_person(row: dict[str, str]) -> None:
    assert symbolic.math("", row["completion"], row["answer"]) == row["math"]


@pytest.mark.parametrize("row", [row for row in ROWS if row["math"]], ids=lambda row: ascii(row["completion"])[-40:])
def test_a_right_completion_votes(row: dict[str, str]) -> None:
    assert vote(row["completion"]) is not None and reference(row["answer"])


def test_what_a_completion_answers() -> None:
    assert answers("x = \\boxed{2} or x = \\boxed{-2}") == ["-2", "2, -2"]
    assert answers("The answer is $\\frac12$.") == ["\\frac12"]
    assert answers("<think>\\boxed{1}</think>#### 2") == ["2"]
    assert answers("\\boxed{2") == answers("It is 2.\nOr 3.") == answers("") == []
    assert vote("\\boxed{1,000}") == vote("#### $1000") == 1000
    assert vote("\\boxed{\\dfrac{1}{2}}") == vote("The answer is: $\\frac{1}{2}$") == "\\frac{1}{2}"


def test_a_reference_that_cannot_be_read_is_no_zero() -> None:
    with pytest.raises(ValueError, match="reference .* cannot be read"):
        symbolic.math("", "\\boxed{1}", "\\frac{")
    assert symbolic.readable("", "", "\\frac{") == 0.0


def test_in_workers_and_what_takes_too_long_is_a_failure() -> None:
    config = configured("math", workers=1, seconds=4)
    texts = ["\\boxed{\\frac{0}{2}}", "\\boxed{1}", "\\boxed{9^{9^{9^{9}}}}"]
    with RewardScorer(config) as scorer:
        assert scorer.score(grouped(texts))[0].rewards_G == [1.0, 0.0]
        assert failed_kinds(scorer) == {"timeout": 1}
        good, bad = grouped(["a"])[0].prompt, Prompt("rows.jsonl:7", "q", "\\frac{", (1,))
        scorer.check_answers([good])
        with pytest.raises(DataError, match=r"rows.jsonl:7: answer: the reward math compares expressions, but this"):
            scorer.check_answers([good, bad])
    assert answers_of(config.rewards)(texts[1]) == 1
