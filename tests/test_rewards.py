"""Rewards: what counts as an answer, that nothing hostile gets through, and that user code is bounded."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.errors import ConfigError, DataError, DeadlineExceeded, RewardError
from grpo.rewards import RewardScorer, boxed, boxed_number, gsm8k, marked_number, reference_number
from grpo.rewards.gsm8k import MAX_ANSWER_CHARS, MAX_CHARS, MAX_DIGITS
from grpo.types import Group, Prompt, Sample

GSM8K_ROWS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"

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
    ("#### 20 minutes 30 seconds", "20"),
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
    ("I do not know.\n\nQuestion: 6 x 7?\n#### 42", "42"),
    ("I do not know.\n\nQuestion 6 x 7?\n#### 42", "42"),
    ("I do not know.\nuser\n6 x 7?\n#### 42", "42"),
    ("#### " + "4" * (MAX_DIGITS + 1), "4" * (MAX_DIGITS + 1)),
    ("#### " + "4" * 500_000, "4"),
    ("####" + " " * MAX_ANSWER_CHARS + "42", "42"),
    ("####" + " " * (MAX_ANSWER_CHARS - 1) + "42", "4"),
    ("x" * MAX_CHARS + "#### 42", "42"),
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
    digits = "9" * MAX_DIGITS
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
        assert found is None or (found.is_finite() and len(found.as_tuple().digits) <= MAX_DIGITS)
        expected = found is not None and found == reference_number(reference)
        assert reward("q", completion, reference) == float(expected)
        if len(completion) > MAX_CHARS:
            assert found is None


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


def test_only_a_bounded_part_is_looked_at():
    class Counting(str):
        """Fails on any look at the text of a completion that is too long."""

        def lstrip(self, *args):
            raise AssertionError("looked at")

        find = rfind = __getitem__ = lstrip

    assert gsm8k("q", Counting("#### 42" + " " * MAX_CHARS), "42") == 0.0


# ---- the scorer -----------------------------------------------------------------------------------------------------

USER_REWARDS = """
    import os, sys, time, subprocess
    def only_bad(f):
        return lambda prompt, completion, answer: f(prompt, completion, answer) if completion == "bad" else 1
    def length(prompt, completion, answer): return len(completion)
    def echo(prompt, completion, answer): return float(prompt == "q0" and answer == "#### 0")
    def keyword(completion, prompt, *, answer): return 1.0
    def two(prompt, completion): return 1.0
    @only_bad
    def raises(prompt, completion, answer): raise ValueError("no\\nluck")
    @only_bad
    def exits(prompt, completion, answer): sys.exit(3)
    @only_bad
    def dies(prompt, completion, answer): os._exit(7)
    @only_bad
    def text(prompt, completion, answer): return "1.0"
    @only_bad
    def nothing(prompt, completion, answer): return None
    @only_bad
    def nan(prompt, completion, answer): return float("nan")
    @only_bad
    def huge(prompt, completion, answer): return 10 ** 400
    def large(prompt, completion, answer): return 1e308
    def prints(prompt, completion, answer):
        print("{}" * 1000); print("{}", file=sys.__stdout__); sys.stdout.flush(); return 0.5
    def reads(prompt, completion, answer): return float(sys.stdin.read() == "")
    def hangs(prompt, completion, answer):
        if completion == "hang":
            child = subprocess.Popen(["sleep", "600"])
            with open("pids", "w") as file: file.write(f"{os.getpid()} {child.pid}")
            while True: pass
        return 1.0
    class Unprintable(Exception):
        def __str__(self): raise RuntimeError
    @only_bad
    def unprintable(prompt, completion, answer): raise Unprintable
    @only_bad
    def writes(prompt, completion, answer):
        for fd in range(3, 20):
            try: os.write(fd, b"junk" * 20_000 + b"\\n" + b'{"reward": 1.0}\\n' * 9)
            except OSError: pass
        return 1.0
    @only_bad
    async def asynchronous(prompt, completion, answer): return 1.0
    not_a_function = 3
"""


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(USER_REWARDS))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)")
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)")
    (tmp_path / "json.py").write_text("raise RuntimeError('a user file must not shadow the standard library')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(*rewards, seconds=60.0):
    rewards = [reward if isinstance(reward, tuple) else (reward, 1.0) for reward in rewards]
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "rewards": [{"function": function, "weight": weight} for function, weight in rewards],
            "deadlines": {"reward": seconds},
        }
    )


def grouped(*texts_PG):
    groups = []
    for row, texts_G in enumerate(texts_PG):
        prompt = Prompt(id=f"file:{row}", question=f"q{row}", answer=f"#### {row}", token_ids=(1,))
        samples = [Sample(prompt.id, i, (1,), (2,), (0.0,), 0, "stop", text) for i, text in enumerate(texts_G)]
        groups.append(Group(prompt, tuple(samples)))
    return groups


def rewards_of(config, groups):
    with RewardScorer(config) as scorer:
        return [group.rewards_G for group in scorer.score(groups)]


def test_built_in_reward_needs_no_process():
    groups = grouped(["#### 0", "#### 1"], ["#### 0", "#### 1"])
    with RewardScorer(configured("gsm8k")) as scorer:
        assert scorer.process is None
        scored = scorer.score(groups)
    assert [group.rewards_G for group in scored] == [[1.0, 0.0], [0.0, 1.0]]
    assert [group.prompt for group in scored] == [group.prompt for group in groups]
    assert [[s.index for s in group.samples] for group in scored] == [[0, 1], [0, 1]]


def test_weighted_sum_of_several_rewards(user_folder):
    config = configured(("gsm8k", 1.0), ("my_rewards:length", 0.25), ("my_rewards:echo", -2.0))
    groups = grouped(["#### 0", "abcd"], ["####1", ""])
    assert rewards_of(config, groups) == [[1.0 + 1.5 - 2.0, 1.0 - 2.0], [1.0 + 1.25, 0.0]]


def test_user_function_may_print_and_read(user_folder, capfd):
    assert rewards_of(configured("my_rewards:prints", "my_rewards:reads"), grouped(["a", "b"])) == [[1.5, 1.5]]
    assert capfd.readouterr().out == ""


def test_odd_completions_reach_the_user_function_whole(user_folder):
    text = "\ud800\x00\u2028\n" + "x" * 1_000_000
    assert rewards_of(configured("my_rewards:length"), grouped([text])) == [[float(len(text))]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("gsm8", "rewards.0.function: a reward is .*did you mean 'gsm8k'"),
        ("reward.py:score me", "rewards.0.function: a reward is .*got 'reward.py:score me'"),
        (":length", "got ':length'"),
        ("my_rewards:lenght", "no function 'lenght'; did you mean my_rewards:length"),
        ("my_rewards:not_a_function", "no function 'not_a_function'"),
        ("my_reward:length", "'my_reward' cannot be imported: ModuleNotFoundError.*; put my_reward.py into .* or"),
        ("broken:f", "'broken' cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("quits:f", "'quits' cannot be imported: SystemExit"),
        ("my_rewards:two", r"called as \(prompt, completion, answer\), but my_rewards:two\(prompt, completion\)"),
        ("my_rewards:keyword", r"but my_rewards:keyword\(completion, prompt, \*, answer\) does not"),
    ],
)
def test_unusable_reward_is_a_config_error_before_anything_starts(user_folder, function, message):
    with pytest.raises(ConfigError, match=message):
        RewardScorer(configured(function))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised ValueError: no luck"),
        ("exits", "raised SystemExit: 3"),
        ("dies", "ended the reward process (exit code 7)"),
        ("text", "returned str"),
        ("nothing", "returned NoneType"),
        ("asynchronous", "returned coroutine"),
        ("nan", "returned nan"),
        ("huge", "raised OverflowError"),
        ("writes", "wrote into the pipe of the reward process"),
        ("unprintable", "raised my_rewards.Unprintable: <exception str"),
    ],
)
def test_failed_reward_is_an_error_not_a_zero(user_folder, function, message):
    expected = f"reward my_rewards:{function} must return a finite number, but for prompt file:0, sample 1, it "
    with pytest.raises(RewardError, match=re.escape(expected + message)):
        rewards_of(configured(("gsm8k", 1.0), (f"my_rewards:{function}", 1.0)), grouped(["fine", "bad"]))


def test_a_disturbed_pipe_leaves_no_reward_behind(user_folder):
    with RewardScorer(configured("my_rewards:writes", "my_rewards:length")) as scorer:
        with pytest.raises(RewardError, match="wrote into the pipe"):
            scorer.score(grouped(["bad"]))
        assert [group.rewards_G for group in scorer.score(grouped(["fine"]))] == [[1.0 + 4.0]]


def test_infinite_sum_is_an_error(user_folder):
    with pytest.raises(RewardError, match="weighted sum .* inf for prompt file:0, sample 0"):
        rewards_of(configured("my_rewards:large", "my_rewards:large"), grouped(["a"]))


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_hanging_reward_is_killed_with_its_children_and_the_next_scoring_works(user_folder):
    with RewardScorer(configured("my_rewards:hangs", seconds=3.0)) as scorer:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="deadlines.reward = 3 s, but my_rewards:hangs"):
            scorer.score(grouped(["ok", "hang"]))
        assert 2.9 < time.monotonic() - start < 30
        pids = [int(pid) for pid in (user_folder / "pids").read_text().split()]
        assert all(gone(pid) for pid in pids)
        assert [g.rewards_G for g in scorer.score(grouped(["ok", "fine"]))] == [[1.0, 1.0]]


def test_hanging_import_is_bounded(user_folder):
    with pytest.raises(DeadlineExceeded, match="deadlines.reward = 1 s, but sleeps:f"):
        RewardScorer(configured("sleeps:f", seconds=1.0))


def test_close_ends_the_process(user_folder):
    scorer = RewardScorer(configured("my_rewards:length"))
    pid = scorer.process.child.pid
    scorer.close()
    scorer.close()
    assert gone(pid)


def test_killed_parent_takes_a_hanging_reward_along(user_folder):
    script = textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        from grpo.rewards.process import RewardProcess
        process = RewardProcess(["my_rewards:hangs"], 600)
        process.call(0, "q", "hang", "a")
    """)
    parent = subprocess.Popen([sys.executable, "-P", "-c", script, str(Path(__file__).parents[1])])
    pids_file = user_folder / "pids"
    end = time.monotonic() + 60
    while not (pids_file.exists() and len(pids_file.read_text().split()) == 2) and time.monotonic() < end:
        time.sleep(0.05)
    worker, grandchild = (int(pid) for pid in pids_file.read_text().split())
    try:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert gone(worker)
    finally:
        for pid in (worker, grandchild):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_answers_that_a_built_in_reward_cannot_read_are_reported():
    good, bad = grouped(["a"])[0].prompt, Prompt("rows.jsonl:7", "q", "forty-two", (1,))
    with RewardScorer(configured("gsm8k")) as scorer:
        scorer.check_answers([good])
        with pytest.raises(DataError, match=r"rows.jsonl:7: answer: .* has none: 'forty-two'; correct the row"):
            scorer.check_answers([good, bad])


def test_user_rewards_may_have_any_answers(user_folder):
    with RewardScorer(configured("my_rewards:length")) as scorer:
        scorer.check_answers([Prompt("rows.jsonl:7", "q", "forty-two", (1,))])
