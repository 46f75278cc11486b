"""Hostile completions through the answer parser: it never raises, never hangs, and never accepts what is not there.

The oracle below is a second reading of the rules, slow and by hand: a character at a time, with decimals. It knows only
when an accept is right, so it may agree to more than the parser does, never to less.
"""

import json
import time
import unicodedata
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo.rewards.gsm8k import boxed, gsm8k

CORPUS = Path(__file__).parent / "corpus" / "completions.jsonl"
REWARDS = {"gsm8k": gsm8k, "boxed": boxed}
MARKERS = {"gsm8k": "####", "boxed": "\\boxed"}
LABELS = ("question", "q", "problem", "exercise", "example", "task", "instruction", "user", "human", "im_start", "inst")
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
measured = {"calls": 0, "accepted": 0}


def read(name, completion, answer):
    """The reward, counted."""
    reward = REWARDS[name]("a prompt", completion, answer)
    measured["calls"] += 1
    measured["accepted"] += reward == 1.0
    assert reward in (0.0, 1.0) and type(reward) is float
    return reward


# ---- the oracle -----------------------------------------------------------------------------------------------------


def right_to_accept(name, completion, number):
    """Whether `number` follows the last marker, or one behind which a next question's label comes before any other.

    A label may itself stand right behind a marker, as a heading does: "#### Question:".
    """
    parts = completion.split(MARKERS[name])
    last = len(parts) - 1
    return any(
        first_number(in_braces(parts[index]) if name == "boxed" else parts[index]) == number
        and (index == last or has_label(parts[index]) or has_label(parts[index + 1].lstrip()[:12]))
        for index in range(1, last + 1)
    )


def in_braces(text):
    """What the braces hold that the text opens with, "" if they do not close."""
    text = text.lstrip().replace("\\\\", "  ").replace("\\{", "  ").replace("\\}", "  ")
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[1:place] if place else ""
    return ""


def has_label(text):
    words = "".join(char if char.isalnum() or char == "_" else " " for char in text.lower()).split()
    return any(word.startswith(LABELS) for word in words)


UNBROKEN = "\u00a0\u2009\u202f"
"""Spaces that do not break: between digits a thousands separator, behind a full stop a space."""


def first_number(text):
    """The number that the first line of the text begins with; None if it is not plain."""
    line = ""
    for char in text.lstrip(" \t") if text.strip() else "":
        if char in LINE_ENDS:
            break
        line += " " if char in UNBROKEN and not line[-1:].isdigit() else fold(char)
    start = next((place for place, char in enumerate(line) if char.isdigit()), None)
    if start is None or any(char.isnumeric() for char in line[:start]):
        return None
    words = line[:start].replace("\\boxed", "").replace("\\text", "").replace("\\math", "").split("\\")
    if any(char.isalpha() and char not in "bfrm" for char in "".join(words)):
        return None
    start -= line[start - 1 : start] == "."
    end = start
    while end < len(line) and (line[end].isdecimal() or line[end] in ".," or glued(line, end) or spaced(line, end)):
        end += 1
    written = line[start:end].rstrip(".,{}\\!;")
    if follows(line[start + len(written) :]):
        return None
    plain = "".join(char for char in written if char.isdigit() or char == ".")
    if plain.count(".") > 1 or not groups_of_three(written):
        return None
    sign = "-" if "-" in line[:start] else ""
    return Decimal(sign + plain)


def glued(line, place):
    """Whether here is a LaTeX spelling of a thousands separator, and a digit behind it."""
    if line[place] not in "{}\\" and not (line[place] in "!;" and line[place - 1] == "\\"):
        return False
    rest = line[place:].lstrip("{},\\!;")
    return len(line[place:]) - len(rest) <= 3 and rest[:1].isdigit()


def spaced(line, place):
    """Whether a space stands between thousands."""
    return line[place] in " ~" and line[place + 1 : place + 4].isdigit() and not line[place + 4 : place + 5].isdigit()


def fold(char):
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if unicodedata.category(char) == "Pd" or char in "\u2212\ufe63\uff0d":
        return "-"
    if char in "\uff0c\u066c\ufe50" + UNBROKEN:
        return ","
    return "." if char in "\uff0e\u066b\ufe52\u3002" else char


def groups_of_three(written):
    """1,234,567 and 1234567, not 1,23: the parts between separators have three digits, but for the first."""
    whole = written.partition(".")[0]
    for separator in ("{,}", ",\\!", "\\,", "\\;", "\\!", "\\ ", " ", "~"):
        whole = whole.replace(separator, ",")
    first, *others = whole.split(",")
    return all(len(part) == 3 for part in others) and (not others or 1 <= len(first) <= 3) and "{" not in whole


def follows(rest):
    """Whether the number goes on: with a digit, a sign of mathematics, a letter alone, or a power of ten."""
    signs = rest.lstrip(" \t*_)]}$")
    if signs[:1] in tuple("!+<>^×÷|\\√π∞≤≥±") and not signs.startswith(
        ("</", "<|", "<t", "^\\circ", "^{\\circ", "\\%", "\\text", "\\$", "\\)", "\\]", "\\ ", "\\,", "\\:", "\\;")
    ):
        return not (signs[:1] == "!" and rest[:1] in "*_" or signs.startswith("|") and not signs.strip("| \t"))
    if rest[:1].isascii() and rest[:1].isalpha() and not rest[1:2].isalpha() and rest[0] not in "mgshlLVAWJKNCFd":
        return True
    if rest[:1].isnumeric():
        return True
    behind = rest.lstrip(" \t*_")
    if behind[:1] in tuple("/^:×÷·-+~") and behind[1:].lstrip(" *_$")[:1].isnumeric():
        return True
    if rest[:1] in ("e", "E", "x", "_", "'") and rest[1:].lstrip("+-")[:1].isnumeric():
        return True
    words = behind.lower().split()
    return behind[:1].isnumeric() or bool(words) and words[0].strip(".,*_)") in ("k", "million", "thousand", "billion")


def check(name, completion, number, answer):
    if read(name, completion, answer) == 1.0:
        assert right_to_accept(name, completion, number), (name, completion[-300:], answer)


# ---- the corpus -----------------------------------------------------------------------------------------------------

ENTRIES = [json.loads(line) for line in CORPUS.read_text().splitlines()]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: ascii(entry["completion"])[:40])
def test_the_corpus_is_scored_as_written_down(entry):
    for name in REWARDS:
        assert read(name, entry["completion"], entry["answer"]) == entry[name], entry["why"]


def test_the_oracle_agrees_with_every_accept_of_the_corpus():
    """Else it would be no judge: what people wrote down as right is right to it."""
    accepts = [(name, entry) for entry in ENTRIES for name in REWARDS if entry[name]]
    assert len(accepts) > 60
    for name, entry in accepts:
        number = Decimal(entry["answer"].replace(",", ""))
        assert right_to_accept(name, entry["completion"], number), (name, entry)


@pytest.mark.parametrize("text", ["{3/4}", "{30 4}", "{3,4}", "{x+30}", "{3^2}", "{}", "{5}\n3"])
@pytest.mark.parametrize("name", REWARDS)
def test_the_oracle_can_say_no(name, text):
    completion = MARKERS[name] + text
    assert not right_to_accept(name, completion, Decimal(3)) and not right_to_accept(name, completion, Decimal(34))


# ---- made up --------------------------------------------------------------------------------------------------------

PIECES = (
    ["####", "#### ", "\n#### ", "\\boxed{", "}", "\\boxed{}", "\\text{", "{", "\\", "\\frac{1}{2}", "$", "**", "("]
    + ["N", "N", "N", "N,000", "N.0", "N.5", "N/2", "N!", "-N", "+N", "N N", "N or 7", "0N", "N0", "1N", "N²", "½"]
    + ["nan", "inf", "1e999999", "5^(5^(5^(5^5)))", "9" * 50, "٤٢", "４２", "१२", "𝟒", "1,23", "1,234", ".", ",", "-"]
    + ["\n", "\r\n", "\u2028", "\x00", "\x1b[31m", "\ud800", "\u200b", "\u202e", "\u00a0", " ", "\t", "\u0130", "ſ"]
    + ["Question:", "\n\nQuestion", "Q:", "\nUser: ", "<|im_start|>", "[INST]", "apples", "million", "k", "=", ":", "%"]
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.tuples(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text(max_size=60)).map("".join),
    st.tuples(st.text(st.characters(), max_size=40), st.sampled_from(["####", "\\boxed{"]), st.text(max_size=30)).map(
        "".join
    ),
)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, st.integers(-(10**9), 10**9) | st.integers(-50, 50))
@example("#### 5^(5^(5^(5^5)))", 5)
@example("#### 41\nQ\u0130: #### N", 42)
def test_whatever_is_accepted_is_right_by_the_oracle(text, number):
    completion = text.replace("N", str(number))
    for name in REWARDS:
        check(name, completion, Decimal(number), str(number))
        check(name, f"so {MARKERS[name]}{'{' if name == 'boxed' else ' '}{completion}", Decimal(number), str(number))


BEFORE = st.lists(
    st.sampled_from(["", " ", "$", "**", "(", "=", ":", "`", "-", "+", "\\text{", "x", "\u200b"]), max_size=3
)
NUMBERS = st.sampled_from(
    [
        "N",
        "N",
        "N.0",
        "N.00",
        "0N",
        "N,",
        "N.5",
        "N0",
        "{n:,}",
        "{n:,}.0",
        ".N",
        "N N",
        "N²",
        "-N",
        "N/1",
        "N,00",
        "N.0.0",
    ]
    + [
        "N%",
        "Nx",
        "Ne0",
        "N-N",
        "N:N",
        "N k",
        "N million",
        "N\u00a0000",
        "{n:,},000",
        "N'000",
        "N_000",
        "(N)",
        "1+N",
        "N^2",
    ]
)
BEHIND = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.text(st.characters(), max_size=8)


@settings(max_examples=1000)
@example(before="", written="N", behind=".\u00a01e999999", number=0)
@example(before="", written="N", behind=".\u00a0million", number=0)
@example(before="", written="N²", behind="####N", number=0)
@given(BEFORE.map("".join), NUMBERS, BEHIND, st.integers(-50, 50) | st.integers(-(10**7), 10**7))
def test_a_number_in_its_place_is_accepted_only_as_itself(before, written, behind, number):
    written = written.replace("N", str(number)).replace("{n:,}", f"{number:,}")
    behind = behind.replace("N", str(number))
    for name, text in (
        ("gsm8k", f"so #### {before}{written}{behind}"),
        ("boxed", f"\\boxed{{{before}{written}}}{behind}"),
    ):
        for wanted in (number, -number, 10 * number, number * 1000, abs(number)):
            check(name, text, Decimal(wanted), str(wanted))


@settings(max_examples=500)
@given(st.text(st.characters(), max_size=80), st.text(st.characters(), max_size=80))
def test_any_two_texts_are_scored(completion, answer):
    for name in REWARDS:
        read(name, completion, answer)
        read(name, f"{MARKERS[name]}{{{completion}}}", f"{MARKERS[name]}{{{answer}}}")


LONG = ["1", "1,", "#", "####", "#### 1\n", "\\boxed{", "{", "}", "\\", "\n", " ", "q ", "Q\n", "q\r", "question "]
LONG += ["\nquestion 1234)", "problem number 1 ", "<|im", "[INS", "\u0130", "\u00a0000", "\n\t\n#", "\u202e", "١"]
LONG += ["\n#>*_([ ", "\ud800"]


def seconds(function, text):
    """Time of this thread alone, the best of three: what others do on the machine does not count."""
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        function("", text, "42")
        best = min(best, time.thread_time() - began)
    return best


@pytest.mark.parametrize("piece", LONG, ids=ascii)
@pytest.mark.parametrize("start", ["", "#### ", "#### 7 ", "\\boxed{1} ", "\\boxed{"], ids=ascii)
def test_the_time_for_long_texts_of_one_piece_is_linear(piece, start):
    """Sixteen times the text takes some sixteen times as long; what is quadratic would take 256 times."""
    for name in REWARDS:
        texts = [(start + piece * (size // len(piece) + 1))[:size] for size in (6_000, 96_000)]
        check(name, texts[0], Decimal(42), "42")
        short, long = (seconds(REWARDS[name], text) for text in texts)
        assert long < 64 * short + 0.01, (short, long)


def test_zz_figures():
    """Last in the file: what all the calls before came to."""
    print(f"\n{measured['calls']} calls, {measured['accepted']} accepted")
    assert measured["calls"] > 5000 and measured["accepted"] > 100
