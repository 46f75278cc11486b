"""The GSM8K reward: 1.0 when the completion's final number equals the reference's, else 0.0.

What counts as the answer of a completion:

1. The last marker counts: `####`, or `\\boxed{…}` for the reward `boxed`. A completion without it has no answer.
2. Nothing counts from the place on where the model invents a next question: a line that begins with a label such as
   "Question:", "Q:", "User:" or "Human" (not the first line, where a model may repeat its task), or an empty line and
   then "Question"; after the first marker also "Problem:", "Example 2:" and such labels in the middle of a line.
3. The number must follow the marker on the same line. Bold, quotes, brackets, currency, "=" and ":" may come between.
4. The number may have a sign, thousands separators and decimals, in digits of any script; units and words may follow.
5. What is not one plain number is no answer: "1,23", "3/4", "12 13", "5-7", "10:30", "1e3", "5²", "5 million".

Numbers are compared as exact decimals, never as texts. Everything is one pass over at most MAX_CHARS characters; the
number itself is looked for in MAX_ANSWER_CHARS of them.
"""

import re
import unicodedata
from decimal import Decimal

MARKER = "####"
MAX_CHARS = 32_768
"""About 8,000 tokens. A longer completion has no answer: cutting it could cut a number in two."""
MAX_ANSWER_CHARS = 256
"""Characters after the marker in which the number must end."""
MAX_DIGITS = 40
"""Longest number, in digits."""

_NOISE = r"[ \t#>*_(\[]{0,8}+"
_NUMBERED = r"(?:[ \t]{0,2}(?:no\.?|number)?[ \t]{0,2}\d{1,4})?+[ \t]{0,2}+[*_)\]]{0,4}+"
# Both read lower-case text and begin with a set of characters: re then skips to a candidate in a fast loop of its own.
_SOON = r"(?=[ \t\dn*_)\]:])"
_NEXT_QUESTION = re.compile(
    rf"[\n\r\u2028]{_NOISE}(?:(?:next |new )?question{_NUMBERED}(?:[:.]|[ \t]?[\n\r])|q{_SOON}{_NUMBERED}:"
    rf"|(?:user|human)[ \t]?(?:[:\n\r]|$))|\n[ \t\r]{{0,4}}\n{_NOISE}question\b"
)
_AFTER_MARKER = re.compile(
    r"[qpetiuh](?<!\w[qpetiuh])(?:(?<=q)(?:uestion)?|(?<=p)roblem|(?<=e)x(?:ercise|ample)|(?<=t)ask|(?<=i)nstruction"
    rf"|(?<=u)ser|(?<=h)uman){_SOON}{_NUMBERED}:|<\|(?:im_start|user|start_header_id)|\[inst\]"
)

_BEFORE = r"(?:[\s*_`:=(\[{\"'“”‘’]|\\[(\[]|\\(?:boxed|text|textbf|mathbf|mathrm)\{)*"
_CURRENCY = r"(?:\\?\$[\s*_]{0,4})?"
_NUMBER = re.compile(
    rf"{_BEFORE}{_CURRENCY}(?P<sign>[+-]?){_CURRENCY}"
    r"(?P<number>(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
_SPACED_THOUSANDS = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_BETWEEN_NUMBERS = re.compile(
    r"(?:[\s$,'_*+/^:x×÷·±∪∩~-]|\\(?:times|cdot|div|pm|cup|cap)|\b(?:or|and|to|times|by|over)\b)*", re.IGNORECASE
)
_SCALE = re.compile(
    r"(?:[.,]|[\s*_)\]}-]*)(?:k|hundreds?|thousands?|millions?|billions?|trillions?|dozens?)\b", re.IGNORECASE
)
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\ufe62\uff0b", "+"),
        **dict.fromkeys("\uff0c\u066c\ufe50", ","),
        **dict.fromkeys("\uff0e\u066b\ufe52\u3002", "."),
        "\uff1a": ":",
        "\uff05": "%",
        "\uff0f": "/",
        "\uff0a": "*",
    }
)


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
    if len(answer) > MAX_CHARS:
        return None
    if MARKER in answer:
        return parse_number(answer[answer.rfind(MARKER) + len(MARKER) :])
    if "\\boxed" in answer:
        return boxed_number(answer)
    return parse_number(answer.lstrip())


def marked_number(completion: str) -> Decimal | None:
    """The number after the last `####` before an invented next question; None if there is none."""
    text = own_answer(completion, MARKER)
    start = text.rfind(MARKER)
    return None if start < 0 else parse_number(text[start + len(MARKER) :])


def boxed_number(completion: str) -> Decimal | None:
    """The number in the last `\\boxed{…}` before an invented next question; None if it is missing or never closes."""
    text = own_answer(completion, "\\boxed")
    start = text.rfind("\\boxed")
    content = None if start < 0 else braced(text[start + len("\\boxed") :][:MAX_ANSWER_CHARS].lstrip())
    if content is None:
        return None
    for spelling in ("{,}", "\\,", "\\;", "\\!"):  # LaTeX spellings of a thousands separator and of no space
        content = content.replace(spelling, "" if spelling == "\\!" else ",")
    return parse_number(content)


def final_number(completion: str) -> Decimal | None:
    """What a completion answers: its marked number, else its boxed one; None if it has neither."""
    number = marked_number(completion)
    return boxed_number(completion) if number is None else number


def own_answer(completion: str, marker: str) -> str:
    """The completion up to where it invents a next question; empty without a marker and if too long to look at."""
    text = completion if len(completion) <= MAX_CHARS else ""
    text = text.lstrip()
    first = text.find(marker)
    if first < 0:
        return ""
    lower = text.replace("\u0130", "i").lower()  # of the same length: that letter alone becomes two
    cuts = [_NEXT_QUESTION.search(lower), _AFTER_MARKER.search(lower, first)]
    return text[: min((cut.start() for cut in cuts if cut), default=len(text))]


def braced(text: str) -> str | None:
    """The content of the braces that open `text`, inner braces matched and `\\{` skipped; None if they never close."""
    depth, escaped = 0, False
    for place, char in enumerate(text):
        if not escaped and char in "{}":
            depth += 1 if char == "{" else -1
        if depth == 0:
            return text[1:place] if place else None
        escaped = char == "\\" and not escaped
    return None


def parse_number(text: str) -> Decimal | None:
    """The one plain number that the first line of `text` begins with; None if there is none or it is not plain."""
    window = text[:MAX_ANSWER_CHARS]
    line = _plain(window.splitlines()[0]) if window.strip() else ""
    match = _NUMBER.match(line)
    if not match or _goes_on(line, match.end()) or (match.end() == MAX_ANSWER_CHARS < len(text)):
        return None
    digits = match["number"].replace(",", "")
    return Decimal(match["sign"] + digits) if len(digits) <= MAX_DIGITS else None


def _plain(line: str) -> str:
    """Digits of any script as 0-9, any currency sign as $, dashes and wide punctuation as ASCII."""
    chars = []
    for char in line.translate(_PUNCTUATION):
        if char.isdecimal():
            char = str(unicodedata.decimal(char))
        elif unicodedata.category(char) == "Sc":
            char = "$"
        chars.append(char)
    return _SPACED_THOUSANDS.sub(",", "".join(chars))


def _goes_on(line: str, end: int) -> bool:
    """Whether the number is part of something else: its word has more digits, or another number or a scale follows."""
    word = line[end:].split(maxsplit=1)[0] if line[end : end + 1].strip() else ""
    if any(char.isnumeric() for char in word) or _SCALE.match(line, end):
        return True
    between = _BETWEEN_NUMBERS.match(line, end)
    after = line[between.end() :] if between else ""
    return after[:1].isnumeric() or after.startswith("\\frac")
