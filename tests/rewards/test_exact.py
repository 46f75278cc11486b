"""Text equality after normalisation: right, wrong and hostile completions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.exact import MAX_TEXT, answer_text, exact, normalised


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Paris", "Paris"),
        ("  paris\n", "Paris"),
        ("The capital.\n#### Paris", "Paris"),
        ("#### Lyon\n... no:\n#### PARIS  ", "#### paris"),
        ("so \\boxed{New   York}", "new york"),
        ("#### \\boxed{Paris}", "Paris"),
        ("#### Paris\rThat is it", "Paris"),
        ("#### Paris\u2028That is it", "Paris"),
        ("Stra\u00dfe", "STRASSE"),
        ("\uff30aris", "Paris"),  # a wide letter
        ("cafe\u0301", "caf\u00e9"),  # an accent of its own
        ("a\u00a0b", "a b"),
        ("\\boxed{\\text{x}}", "\\text{x}"),
        ("#### 1,000", "1,000"),
        ("Paris" + " " * 40_000, "Paris"),
        ("x" * 40_000 + "\n#### Paris", "Paris"),
        ("Question: the capital?\n#### Paris", "Paris"),
        ("e\u0301" * MAX_TEXT, "\u00e9" * MAX_TEXT),  # twice as long before its accents are put together
        ("#### Paris\nQuestion: and Spain?\n#### Madrid", "Paris"),
    ],
)
def test_right(completion: str, answer: str) -> None:
    assert exact("q", completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Paris.", "Paris"),  # punctuation counts
        ("The answer is Paris", "Paris"),  # without a marker the whole text is the answer
        ("Paris\n#### Lyon", "Paris"),
        ("#### Paris\n#### Lyon", "Paris"),
        ("\\boxed{Paris", "Paris"),  # it never closes
        ("####", ""),
        ("", ""),
        (" \n\t", " "),
        ("1000", "1,000"),  # texts, not numbers
        ("a" * (MAX_TEXT + 1), "a" * (MAX_TEXT + 1)),
    ],
)
def test_wrong(completion: str, answer: str) -> None:
    assert exact("q", completion, answer) == 0.0


@given(st.text(max_size=200), st.text(max_size=50))
def test_whatever_comes_is_0_or_1_and_the_same_text_answers_itself(completion: str, answer: str) -> None:
    assert exact("", completion, answer) in (0.0, 1.0)
    text = answer_text(completion)
    assert exact("", completion, completion) == float(text is not None)
    if text is not None:
        assert normalised(text) == text


@pytest.mark.parametrize("piece", ["####", "\\boxed{", "}", "\u0301", "\ufdfa", "#### \\boxed{", "\nQuestion:", "\\"])
def test_repetition_is_answered(piece: str) -> None:
    assert exact("", piece * (100_000 // len(piece)), "x") == 0.0
