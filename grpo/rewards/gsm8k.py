"""The GSM8K reward: 1.0 when the completion's final number equals the reference's, else 0.0.

What counts as the answer of a completion:

1. The last marker counts: `####`, or `\\boxed{…}` for the reward `boxed`. A completion without it has no answer.
2. What a model thinks (up to `</think>`) counts only if no marker follows. A question that is restated costs nothing.
3. Behind the first answer nothing counts from where the model invents a next question: a line that begins with a label
   such as "Question:", "Q:", "User:" or "Human"; an empty line and then "Question"; and in the middle of a line
   "Question:", "Problem 3:", "Example:", "User:" with a capital, or a chat template's mark.
4. The number must follow the marker on the same line. Bold, quotes, brackets, currency, "=" and ":" may come between.
5. It is one plain number: an optional sign, thousands separators and decimals, in digits of any script, and behind it
   nothing but what leaves a number alone (`number.py`). The reference is read by the same rule.

Numbers are compared as exact decimals, never as texts. All takes time linear in the text, however long that is.
"""

import re
from collections.abc import Mapping
from decimal import Decimal

from grpo.rewards.number import parse_number

MARKER, BOX = "####", "\\boxed"

_NOISE = r"[ \t#>*_(\[]{0,8}+"
_NUMBERED = r"(?:[ \t]{0,2}(?:no\.?|number)?[ \t]{0,2}\d{1,4})?+[ \t]{0,2}+[*_)\]]{0,4}+"
# Both begin with a set of characters: re then skips to a candidate in a fast loop of its own. The first is for lower
# case.
_SOON = r"(?=[ \t\dn*_)\]:])"
_NEXT_QUESTION = re.compile(
    rf"[\n\r\u2028]{_NOISE}(?:(?:next |new )?question{_NUMBERED}(?:[:.]|[ \t]?[\n\r])|q{_SOON}{_NUMBERED}:"
    rf"|(?:user|human)[ \t]?(?:[:\n\r]|$))|\n[ \t\r]{{0,4}}\n{_NOISE}question\b"
)
_NEXT_LABEL = re.compile(
    r"[QPETIUH](?<!\w[QPETIUH])(?<!\bthe [QPETIUH])(?<!\bthis [QPETIUH])(?i:(?<=q)(?:uestion)?|(?<=p)roblem"
    r"|(?<=e)x(?:ercise|ample)|(?<=t)ask|(?<=i)nstruction|(?<=u)ser|(?<=h)uman)"
    rf"(?i:{_SOON}{_NUMBERED}):|<\|(?:im_start|user|start_header_id)|\[INST\]|<start_of_turn>|<｜User｜>"
)
_THOUGHTS_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]")
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")
_NUMBER_SOON = r"(?=[^\w\n#]{0,24}(?:(?:boxed|text|textbf|mathbf|mathrm|USD|EUR|Rs)[^\w\n#]{0,8})?\d)"
FIRST_NUMBER = {marker: re.compile(re.escape(marker) + _NUMBER_SOON) for marker in (MARKER, BOX)}
"""What the first answer of a completion looks like, whatever it is worth."""
FIRST_TEXT = {MARKER: re.compile(r"####[#\s*_:]{0,24}[^#\s*_:]"), BOX: re.compile(r"\\boxed\s?\{\s?[^\s}]")}
"""The same where answers are words."""
_PART_OF_MORE = re.compile(r"\^(?! ?\{? ?\\circ)|/\d|\\(?:pi|sqrt|frac|times|cdot|pm|infty)\b")
"""Right behind a box: what stands in it is not all."""
_LINE = re.compile("[^\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]*+")
_SPACE = re.compile(r"\s*+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def gsm8k(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the number after the last `####` of the completion equals the reference, else 0.0. Never raises."""
    return _one_if_equal(marked_number(completion), answer)


def boxed(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the number in the last `\\boxed{…}` of the completion equals the reference, else 0.0. Never raises."""
    return _one_if_equal(boxed_number(completion), answer)


def _one_if_equal(number: Decimal | None, answer: str) -> float:
    return 1.0 if number is not None and number == reference_number(answer) else 0.0


def reference_number(answer: str) -> Decimal | None:
    """The number of an answer column: a full GSM8K answer ("… #### 72"), a boxed one, or the bare number ("72")."""
    if MARKER in answer:
        return _behind(answer, answer.rfind(MARKER) + len(MARKER))
    if BOX in answer:
        return _in_box(answer)
    return _behind(answer.lstrip(), 0)


def marked_number(completion: str) -> Decimal | None:
    """The number after the last `####` before an invented next question; None if there is none."""
    text = own_answer(completion, MARKER)
    start = text.rfind(MARKER)
    return None if start < 0 else _behind(text, start + len(MARKER))


def boxed_number(completion: str) -> Decimal | None:
    """The number in the last `\\boxed{…}` before an invented next question; None if it is missing or never closes."""
    return _in_box(own_answer(completion, BOX))


def final_number(completion: str) -> Decimal | None:
    """What a completion answers: its marked number, else its boxed one; None if it has neither."""
    number = marked_number(completion)
    return boxed_number(completion) if number is None else number


def own_answer(completion: str, marker: str, first: Mapping[str, re.Pattern[str]] = FIRST_NUMBER) -> str:
    """The completion from behind its thoughts up to where it invents a next question; empty without a marker."""
    text = completion[thoughts_end(completion, marker) :].lstrip()
    answer = first[marker].search(text)
    if answer is None:
        return text if marker in text else ""
    lower = text.replace("\u0130", "i").lower()  # of the same length: that letter alone becomes two
    cuts = [_NEXT_QUESTION.search(lower, answer.end()), _NEXT_LABEL.search(text, answer.end())]
    return text[: min((cut.start() for cut in cuts if cut), default=len(text))]


def thoughts_end(completion: str, marker: str) -> int:
    """Where the thoughts end that a completion begins with, if the marker follows them; else 0."""
    end = _THOUGHTS_END.search(completion)
    if not end or completion.find(marker, end.end()) < 0:
        return 0
    begin = _THOUGHTS_BEGIN.search(completion, 0, end.start())
    return end.end() if not begin or completion.find(marker, 0, begin.start()) < 0 else 0


def braced(text: str, place: int = 0) -> str | None:
    r"""The content of the braces that open there, inner braces matched and `\{` skipped; None if they never close."""
    depth = 0
    if not text.startswith("{", place):
        return None
    for brace in _BRACE.finditer(text, place):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return text[place + 1 : brace.start()]
    return None


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds; None if there is none, or it never closes or is a part of something else."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start = _SPACE.match(text, start + len(BOX)).end()  # type: ignore[union-attr]
    content = braced(text, start)
    return None if content is None or _PART_OF_MORE.match(text, start + len(content) + 2) else content


def _behind(text: str, place: int) -> Decimal | None:
    line = _LINE.match(text, place)
    return parse_number(line.group()) if line else None


def _in_box(text: str) -> Decimal | None:
    content = last_box(text)
    return None if content is None else parse_number(" ".join(content.split()))
