"""Text equality after normalisation: right, wrong and hostile completions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.exact import MAX_TEXT, answer_text, exact, normalised
from grpo.rewards.gsm8k import MAX_CHARS


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
        ("Paris" + " " * MAX_CHARS, "Paris"),
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
    assert exact("", piece * (MAX_CHARS // len(piece)), "x") == 0.0
