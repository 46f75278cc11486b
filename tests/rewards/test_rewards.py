"""Built-in rewards: what counts as an answer, and that nothing hostile gets through."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo.errors import ConfigError, DataError
from grpo.rewards.gsm8k import (
    boxed,
    boxed_number,
    gsm8k,
    marked_number,
    reference_number,
)
from grpo.rewards.registry import RewardScorer
from grpo.types import Prompt
from tests.reward_helpers import configured, grouped, rewards_of

GSM8K_ROWS = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"

RIGHT = [  # completion, reference
    ("So 72.\n#### 72", "72"),
    ("####72", "She sold 48+24=72.\n#### 72"),
    ("#### 42.00", "42"),
    ("#### 42", "42.0"),
    ("#### 42.", "42"),
    ("#### **42**", "42"),
    ("**#### 42**", "42"),
    ("#### $1,234.50", "1234.5"),
    ("#### \\$1,234", "1,234"),
    ("#### £5", "5"),
    ("#### 5€", "5"),
    ("#### **$5**", "5"),
    ("#### $**5**", "5"),
    ("#### $5$", "5"),
    ("#### \\(5\\)", "5"),
    ("#### \\boxed{42}", "42"),
    ("#### `42`", "42"),
    ("#### = 42", "42"),
    ("#### -7", "-7"),
    ("#### −7", "-7"),
    ("#### –7", "-7"),
    ("#### -$7", "-7"),
    ("#### $-7", "-7"),
    ("#### +7", "7"),
    ("#### -0", "0"),
    ("#### 007", "7"),
    ("#### .5", "0.5"),
    ("#### 50%", "50"),
    ("#### 42 apples (about 3 a day)", "42"),
    ("#### 42kg", "42"),
    ("#### 42, which is even", "42"),
    ("#### 42 = 40 + 2 apples", "42"),
    ("#### ４２", "42"),
    ("#### ＄１，２３４．５", "1234.5"),
    ("#### ٤٢", "42"),
    ("#### १२", "12"),
    ("#### 𝟒𝟐", "42"),
    ("#### 1\u202f234\u202f567", "1234567"),
    ("####\u00a042\u00a0dollars", "42"),
    ("#### 1\n#### 2", "2"),
    ("#### 1 #### 2", "2"),
    ("#### 42\n3 lines follow", "42"),
    ("##### 42", "42"),
    ("#### 42\n\nQuestion: Tom has 5 apples.\n#### 5", "42"),
    ("#### 42\n\nQuestion\nTom has 5 apples.\n#### 5", "42"),
    ("#### 42\nQ: Tom has 5.\nA: #### 5", "42"),
    ("#### 42\n**Question 2:** Tom\n#### 5", "42"),
    ("#### 42\nUser: thanks #### 5", "42"),
    ("#### 42\nuser\nTom has 5\n#### 5", "42"),
    ("#### 42\nHuman: next #### 5", "42"),
    ("#### 42 Question: Tom? #### 5", "42"),
    ("#### 42\nProblem 3: Tom #### 5", "42"),
    ("#### 42<|im_start|>user Tom #### 5", "42"),
    ("Question: 6 x 7?\nAnswer: 42\n#### 42", "42"),
    ("To answer the Question: multiply.\n#### 42", "42"),
    ("Problem: multiply 6 and 7.\n#### 42", "42"),
    ("#### 109,200,000", "109200000"),
    ("I do not know.\n\nQuestion: 6 x 7?\n#### 42", "42"),  # a question that is restated costs nothing
    ("I do not know.\n\nQuestion 6 x 7?\n#### 42", "42"),
    ("**Question:** 6 x 7?\n**Answer:** #### 42", "42"),
    ("The form is #### and a number.\nUser: 6 x 7?\n#### 42", "42"),
    ("<think>#### 5?\nUser: no\n</think>#### 42", "42"),
    ("<think>#### 42\n</think>That is all.", "42"),
    ("#### 42<think>\nQuestion: 5?</think>#### 5", "42"),
    ("#### 41\nNo: the question: says 42.\n#### 42", "42"),
    ("#### " + "4" * 100, "4" * 100),
    ("####" + " " * 5_000 + "42", "42"),
    ("#### 42 " + "apples " * 5_000, "42"),
    ("x" * 33_000 + "#### 42", "42"),
    ("Question: 6 x 7? 42, as 6 x 7 is 42.\n" * 80_000 + "#### 42", "42"),  # three million characters
]

WRONG = [  # completion, reference that it must not be taken for
    ("42", "42"),
    ("The answer is 42.", "42"),
    ("### 42", "42"),
    ("\\boxed{42}", "42"),
    ("#### 42", "43"),
    ("#### 42", "-42"),
    ("#### −42", "42"),
    ("#### --42", "-42"),
    ("#### ±42", "42"),
    ("#### - 42", "42"),
    ("#### >= 42", "42"),
    ("#### < 42", "42"),
    ("#### 42.001", "42"),
    ("#### 1,23", "1"),
    ("#### 1,23", "123"),
    ("#### 1,23", "1.23"),
    ("#### 0,123", "123"),
    ("#### 1,2345", "12345"),
    ("#### 1,234,56", "1234"),
    ("#### 1.234.567", "1.234"),
    ("#### 1.234,5", "1.234"),
    ("#### 20 minutes 30 seconds", "20"),
    ("####" + " " * 255 + "42", "4"),
    ("#### 42\nQuestion: 5?\n#### 5", "5"),
    ("#### 12 13", "12"),
    ("#### 12 13", "13"),
    ("#### 12, 13, 14", "12"),
    ("#### 12 or 13", "12"),
    ("#### 1 000", "1"),
    ("#### 3/4", "3"),
    ("#### 3 / 4", "3"),
    ("#### \\frac{3}{4}", "3"),
    ("#### 5 1/2", "5"),
    ("#### 5½", "5"),
    ("#### 5 ½", "5"),
    ("#### 5²", "5"),
    ("#### 5²", "52"),
    ("#### 5^2", "5"),
    ("#### 5 x 3", "5"),
    ("#### 5 \\times 3", "5"),
    ("#### 5-7", "5"),
    ("#### 10:30", "10"),
    ("#### 1e3", "1"),
    ("#### 1e9999", "1"),
    ("#### 0x2A", "0"),
    ("#### 1_000", "1"),
    ("#### 1'000", "1"),
    ("#### 5 million", "5"),
    ("#### 5k", "5"),
    ("#### 5万", "5"),
    ("#### ④", "4"),
    ("#### nan", "nan"),
    ("#### inf", "inf"),
    ("#### Infinity", "Infinity"),
    ("#### -inf", "-inf"),
    ("#### the answer is 42", "42"),
    ("####\n42", "42"),
    ("#### 42\n####", "42"),
    ("#### 42\n#### Explanation", "42"),
    ("####", "42"),
    ("", ""),
    ("#### 42", ""),
    ("#### 42", "many"),
    ("####", "####"),
    ("#### " + "4" * 500_000, "4"),
]

BOXED = [
    ("so \\boxed{42}", "42", 1.0),
    ("\\boxed{1} no, \\boxed{42}.", "42", 1.0),
    ("\\boxed{\\text{42}}", "42", 1.0),
    ("\\boxed{\\$1{,}234.50}", "1234.5", 1.0),
    ("\\boxed{1\\,234}", "1234", 1.0),
    ("\\boxed{42\\%}", "42", 1.0),
    ("\\boxed{42\\text{ {nested} apples}}", "#### 42", 1.0),
    ("\\boxed {42}", "42", 1.0),
    ("\\boxed{\n42\n}", "42", 1.0),
    ("\\boxed{42}^\\circ", "42", 1.0),
    ("\\boxed{42}^2", "42", 0.0),
    ("\\boxed{42}\\pi", "42", 0.0),
    ("\\boxed{" + " " * 5_000 + "42}", "42", 1.0),
    ("\\boxed{-42}", "-42", 1.0),
    ("\\boxed{42}\n\nQuestion: Tom? \\boxed{5}", "42", 1.0),
    ("\\boxed{42}", "\\boxed{42}", 1.0),
    ("#### 42", "42", 0.0),
    ("\\boxed{42", "42", 0.0),
    ("\\boxed{42} \\boxed{4", "42", 0.0),
    ("\\boxed{}", "42", 0.0),
    ("\\boxed 42", "42", 0.0),
    ("\\boxed", "42", 0.0),
    ("\\boxed{\\}42", "42", 0.0),
    ("\\boxed{\\frac{1}{2}}", "1", 0.0),
    ("\\boxed{5^(5^(5^(5^5)))}", "5", 0.0),
    ("\\boxed{x = 42}", "42", 0.0),
    ("\\boxed{42 43}", "42", 0.0),
]


@pytest.mark.parametrize(("completion", "reference"), RIGHT)
def test_right_answers_score_one(completion, reference):
    assert gsm8k("q", completion, reference) == 1.0


@pytest.mark.parametrize(("completion", "reference"), WRONG)
def test_what_is_not_the_answer_scores_zero(completion, reference):
    assert gsm8k("q", completion, reference) == 0.0


@pytest.mark.parametrize(("completion", "reference", "reward"), BOXED)
def test_boxed(completion, reference, reward):
    assert boxed("q", completion, reference) == reward


def test_huge_numbers_compare_exactly():
    digits = "9" * 60
    assert gsm8k("q", f"#### {digits}", digits) == 1.0
    assert gsm8k("q", f"#### {digits}", digits[:-1] + "8") == 0.0
    assert gsm8k("q", "#### 9007199254740993", "9007199254740992") == 0.0  # equal as doubles


@pytest.mark.skipif(not GSM8K_ROWS.is_dir(), reason="the GSM8K rows are not on this machine")
def test_all_reference_answers_of_gsm8k():
    answers = [
        json.loads(line)["answer"] for name in ("train", "test") for line in (GSM8K_ROWS / f"{name}.jsonl").open()
    ]
    assert len(answers) == 7473 + 1319
    for answer in answers:
        number = reference_number(answer)
        assert gsm8k("", answer, answer) == 1.0
        assert gsm8k("", f"#### ${number:,}.00", answer) == 1.0
        assert boxed("", f"\\boxed{{{number}}}", answer) == 1.0
        for other in (number + 1, number - 1, number * 10 or 10, -number or 1, number + Decimal("0.5")):
            assert gsm8k("", f"#### {other}", answer) == 0.0
        for spelling in (">= {}", "{}1", "{}/2", "{}e1", "{0} {0}", "~{}", "{}:30", "{}-{}"):
            assert gsm8k("", f"#### {spelling.format(number, number)}", answer) == 0.0


FRAGMENTS = st.sampled_from(
    ["####", " #### ", "#", "##", "\\boxed{", "\\text{", "\\frac{1}{2}", "{", "}", "\\", "\\\\"]
    + ["42", "1,234", "1,23", " 7", "10:30", "9" * 22, "５２", "²", "½", "1e9999", "nan", "inf", "5^(5^(5^(5^5)))"]
    + list(".,-−+$€%/:'_<>=([\"`~| ")
    + ["**", "million", "or", "\n", "\r\n", "\u2028", "\x00", "\ud800", "\u200b"]
    + ["Question:", "\n\nQuestion", "Q:", "User:", "\u202e", "\u00a0"]
)
HOSTILE = st.one_of(
    st.lists(FRAGMENTS, max_size=40).map("".join),
    st.text(st.characters(), max_size=200),
    st.tuples(st.lists(FRAGMENTS, max_size=6).map("".join), FRAGMENTS, st.integers(1, 200_000)).map(
        lambda parts: parts[0] + parts[1] * (parts[2] // max(1, len(parts[1])))
    ),
)


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(HOSTILE, HOSTILE)
@example("#### 5^(5^(5^(5^5)))", "5")
@example("#### " + "1," * 100_000, "1")
@example("\\boxed{" * 50_000, "1")
def test_hostile_texts_never_raise_and_never_pass_for_another_number(completion, reference):
    for reward, number in ((gsm8k, marked_number), (boxed, boxed_number)):
        found = number(completion)
        assert found is None or found.is_finite()
        expected = found is not None and found == reference_number(reference)
        assert reward("q", completion, reference) == float(expected)


@settings(max_examples=1000)
@given(st.integers(-(10**12), 10**12), st.lists(FRAGMENTS, max_size=5).map("".join))
def test_an_accepted_number_is_written_in_the_text(number, tail):
    """No wrong accept: whatever follows the number, the parser returns it, a longer one that is there, or none."""
    found = marked_number(f"#### {number}{tail}")
    if found is None or found == number:
        return
    text = f"{number}{tail}".replace(",", "").replace("５２", "52").replace("\u00a0", "")
    assert str(found.copy_abs()).lstrip("0") in text  # abs() would round


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15, places=3))
def test_every_spelling_of_a_number_is_that_number(number):
    plain = f"{number:f}"
    for spelling in (plain, f"{number:,f}", f"**{plain}**", f"{plain}00", f"{plain} units", f"{plain}.", f"${plain}"):
        assert marked_number(f"text #### {spelling}") == number
        assert reference_number(spelling) == number
    wide = plain.translate(str.maketrans("0123456789.-", "０１２３４５６７８９．－"))
    assert marked_number(f"####{wide}") == number


# ---- the scorer -----------------------------------------------------------------------------------------------------


def test_built_in_reward_needs_no_process():
    groups = grouped(["#### 0", "#### 1"], ["#### 0", "#### 1"])
    with RewardScorer(configured("gsm8k")) as scorer:
        assert scorer.pool is None
        scored = scorer.score(groups)
        assert scorer.failures() == {}
        assert scorer.isolation == ()
    assert [group.rewards_G for group in scored] == [[1.0, 0.0], [0.0, 1.0]]
    assert [group.prompt for group in scored] == [group.prompt for group in groups]
    assert [[s.index for s in group.samples] for group in scored] == [[0, 1], [0, 1]]


def test_a_misspelt_built_in_reward_is_named():
    with pytest.raises(ConfigError, match="rewards.0.function: a reward is .*did you mean 'gsm8k'"):
        RewardScorer(configured("gsm8"))


def test_answers_that_a_built_in_reward_cannot_read_are_reported():
    good, bad = grouped(["a"])[0].prompt, Prompt("rows.jsonl:7", "q", "forty-two", (1,))
    with RewardScorer(configured("gsm8k")) as scorer:
        scorer.check_answers([good])
        with pytest.raises(
            DataError, match=r"rows.jsonl:7: answer: .* has none: 'forty-two'; correct the row, use the reward"
        ):
            scorer.check_answers([good, bad])


def test_modules_are_found_in_their_folder_and_may_read_what_lies_there(tmp_path):
    (tmp_path / "code" / "pack").mkdir(parents=True)
    (tmp_path / "code" / "words.txt").write_text("one two three")
    (tmp_path / "code" / "pack" / "inside.py").write_text("FACTOR = 2")
    (tmp_path / "code" / "mine_in_folder.py").write_text(
        "from pathlib import Path\nfrom pack.inside import FACTOR\n"
        "def f(prompt, completion, answer):\n"
        "    return float(FACTOR * len(Path(__file__).with_name('words.txt').read_text().split()))\n"
    )
    config = configured("mine_in_folder:f", folder=str(tmp_path / "code"))
    assert rewards_of(config, grouped(["a", "b"])) == [[6.0, 6.0]]
    with pytest.raises(ConfigError, match=r"reward_code.folder: must name a folder that is here, found none at '/no/"):
        RewardScorer(configured("mine_in_folder:f", folder="/no/such"))
