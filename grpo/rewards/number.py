"""The plain number that a text begins with, exactly, if nothing but an allowed tail follows it.

A number may be followed by what is known to leave it alone, and by nothing else: units and other words ("42 apples",
"42 km/h", "42 m^2"), `\\text{…}` with such words, a percent, degree or currency sign, closing brackets, quotes and
emphasis, punctuation, and an explanation behind a comma, a full stop, in brackets or from "in" or "because" on. So
"2\\pi", "3x", "5!", "[5,\\infty)", "4<x", "2 or -2", "5 and a half" and "12 hours 30 minutes" are no plain numbers.

All of it takes time linear in the text, whose length has no limit; only LONGEST_TAIL characters behind the number
decide whether it is plain.
"""

import re
import unicodedata
from decimal import Decimal

from grpo.rewards.words import (
    BEFORE_AN_ASIDE,
    NOT_BEHIND,
    NUMBER_WORDS,
    SHORT,
    SINGLE_LETTERS,
    UNITS,
    is_scale,
)

LONGEST_TAIL = 512
"""Characters of a line behind the number that are looked at."""

_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\ufe62\uff0b", "+"),
        **dict.fromkeys("\uff0c\u066c\ufe50\u3001", ","),
        **dict.fromkeys("\uff0e\u066b\ufe52\u3002", "."),
        **dict.fromkeys("\u200b\u2060\ufeff\u200e\u200f", " "),
        "\u00ba": "°",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\uff1a": ":",
        "\uff1b": ";",
        "\uff05": "%",
        "\uff0f": "/",
        "\uff0a": "*",
        "\uff08": " (",
        "\uff09": ")",
        "\uff01": "!",
        "\uff1f": "?",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
    }
)

_DOLLAR = r"\\?\$"
_OPENING = (
    rf"(?:[\s*_`:=(\[{{\"'“”‘’«]|{_DOLLAR}|\\[(\[,;:! ]|\\(?:boxed|displaystyle|(?:text|math)(?:bf|rm|it|sf|tt)?)\b ?"
    r"|(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CHF|Rs\.?|(?:US|CA|AU|NZ|HK|NT|[ACRS])(?=\\?\$))(?![^\W\d_]))*+"
)
_SKIPPED = re.compile(_OPENING)
_RUN = re.compile(r"(?:[^\w\r\n]|\d)*+")
"""Everything up to the first letter: the number ends in it, however long it is."""
_NUMBER = re.compile(
    rf"{_OPENING}(?P<sign>[+-]?)(?:{_DOLLAR}[\s*_]{{0,4}}+)?"
    r"(?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,;:! ]|~|[ \u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")

_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}++(?:['.&-]{_LETTER}++)*+"
_SPACE = r"(?:\s|\\[ ,;:!]|\\q?quad\b|~)"
_ASIDE = re.compile(rf"{_SPACE}*+[\"'*_`)\]}}$]*+(?P<word>{_WORD}|$)")
"""What an explanation begins with."""
_PIECE = re.compile(
    rf"(?P<space>{_SPACE}++)"
    r"|(?P<tag></\w|<\||<(?:[a-z_]{2,20}|s) ?/?>|\[/?[A-Z]{2,})"
    r"|(?P<close>(?:\\[)\]]|\\(?:checkmark|(?:black)?square|hfill)\b|[»]|\\right\)|[)\]}`\"]|'(?!\w)|[*_]++(?![\w(\\])|\|(?=\s*+$|\s*+\|))++)"
    rf"|(?P<sign>\\?%|{_DOLLAR}|(?:\^ ?(?:\{{ ?\\circ ?\}}|\\circ\b)|°|\\degree\b)"
    r"(?: ?\\(?:text|mathrm)\{ ?[CFK]\}| ?[CFK]\b)?)"
    r"|(?P<text>\\(?:text|mathrm|mbox|textit|textrm|textbf|operatorname) ?"
    r"\{(?P<inner>[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+)\})"
    r"|(?P<power>\^(?:\{-?[1-4]\}|-?[1-4])(?!\w))"
    rf"|(?P<word>{_WORD})"
    rf"|(?P<join>(?:-|[/·] ?)(?={_LETTER}|\\text|\\mathrm))"
    r"|(?P<equal>=[\s0-9.,+*/×÷·()$%-]*+(?=$|[}\]]|[^\W\d_]{2}))"
    r"|(?P<bracket>\()"
    r"|(?P<mark>[.,;:!?…-]++)"
)

_NO_BRACES = re.compile("[{}]")
_CLOSERS = re.compile(r"(?:[\"'*_`)\]}$]|\\[)\]])*+")
_NUMBER_FOLLOWS = re.compile(rf"\s*(?:[^\w\s]*\d|(?:an?|{'|'.join(NUMBER_WORDS)})\b)", re.IGNORECASE)
_WORD_FOLLOWS = re.compile(rf"\s+{_LETTER}{{2}}")
NOT_LATIN = "\u0400"
"""From this character on letters are no variables of formulas, but for the mathematical ones."""
JOINING_CHARACTERS = frozenset("或和与及又至到и")
"""Words of one character that join two answers."""


def parse_number(line: str) -> Decimal | None:
    """The one plain number that a line (a text without line breaks) begins with; None if there is none."""
    start = _SKIPPED.match(line)
    assert start
    run = _RUN.match(line, start.end())
    assert run
    line = _folded(line[start.end() : run.end() + LONGEST_TAIL])
    match = _NUMBER.match(line)
    if not match or not _allowed(line, match.end()):
        return None
    return Decimal(match["sign"] + match["number"].replace(",", ""))


def _folded(line: str) -> str:
    """Digits of any script as 0-9, any currency sign as $, dashes, quotes and wide punctuation as ASCII, no accents of
    their own, and what groups thousands as commas.
    """
    if not line.isascii():
        chars: list[str] = []
        for char in line.translate(_PUNCTUATION):
            category = unicodedata.category(char)
            if category == "Nd":
                char = str(unicodedata.decimal(char))
            elif category == "Sc":
                char = "$"
            elif category == "So" and char != "°":
                char = " "  # a tick, a star
            elif category[0] == "M" and chars and chars[-1].isalpha():
                continue  # a vowel sign or an accent belongs to its letter
            chars.append(char)
        line = "".join(chars)
    return _THOUSANDS.sub(",", line)


def _allowed(line: str, place: int, inner: bool = False) -> bool:
    """Whether all that stands behind a number leaves it alone. `inner`: it stands in a `\\text{…}`."""
    words, spaced, joined = 0, inner, False
    while place < len(line):
        piece = _PIECE.match(line, place)
        if not piece:
            return False
        kind, before, place = piece.lastgroup, line[place - 1 : place], piece.end()
        if kind == "tag":
            return True
        if kind == "equal":
            return any(char.isdigit() for char in piece.group())
        if kind == "bracket":
            return spaced and (words > 0 or _is_aside(line, place, numbers=True))
        if kind == "mark":
            return _ends(line, piece, words > 0 or before in ("*", "_", '"', "'"), spaced)
        if kind == "power" and not (words and not spaced):
            return False
        if kind == "text":
            if not _allowed(_NO_BRACES.sub("", piece["inner"]), 0, inner=True):
                return False
            words += 1
        if kind == "word":
            word = piece.group()
            if words and word.casefold() in BEFORE_AN_ASIDE:
                return True
            if not _is_unit(word, words, spaced, joined, line[place:], inner):
                return False
            words += 1
        spaced, joined = kind == "space" or (spaced and kind == "close"), kind == "join"
    return True


def _ends(line: str, piece: re.Match[str], behind_word: bool, spaced: bool) -> bool:
    """Whether a punctuation mark ends the answer: the end, another sentence or an explanation follows."""
    marks, place = piece.group(), piece.end()
    if ("!" in marks or ".." in marks or "…" in marks) and not behind_word:  # a factorial, more digits, more numbers
        return False
    if "-" in marks and not spaced:
        return False
    closers = _CLOSERS.match(line, place)
    assert closers
    rest = line[closers.end() :]
    if not rest:
        return True
    if rest[0].isspace() and marks[-1] not in ",;:-":
        return True
    return (rest[0].isspace() or rest[0] >= NOT_LATIN) and _is_aside(line, place)


def _is_aside(line: str, place: int, numbers: bool = False) -> bool:
    """Whether an explanation begins there, and not a second answer. `numbers`: it may say the number in words."""
    found = _ASIDE.match(line, place)
    word = found["word"] if found else "x"
    if any(map(str.isnumeric, word)):
        return False
    folded = word.casefold()
    if found and (not word or word == "I" or word[0] >= NOT_LATIN):
        return folded not in NOT_BEHIND
    return len(word) > 1 and not (folded in NOT_BEHIND or (folded in NUMBER_WORDS and not numbers) or is_scale(folded))


def _is_unit(word: str, words: int, spaced: bool, joined: bool, rest: str, inner: bool) -> bool:
    """Whether a word behind a number and `words` other words is one of its units, or of the sentence about it."""
    folded = word.casefold()
    if any(map(str.isnumeric, word)) or folded in NUMBER_WORDS or folded in ("or", "oder", "ou", "either"):
        return False
    if word[0] >= NOT_LATIN and unicodedata.normalize("NFKC", word[0]) == word[0]:
        return word[0] not in JOINING_CHARACTERS and (words > 0 or not (folded in NOT_BEHIND or is_scale(folded)))
    if words:
        if folded in ("and", "und", "et", "y", "e", "plus"):
            return not inner and not _NUMBER_FOLLOWS.match(rest)
        return len(word) > 1 or folded in ("a", "i") or word in SINGLE_LETTERS and (spaced or joined)
    if folded in NOT_BEHIND or is_scale(folded):
        return False
    if len(word) == 1 and not (word in SINGLE_LETTERS and not joined):
        return folded == "a" and bool(_WORD_FOLLOWS.match(rest))
    if len(word) > 2 and (spaced or joined):
        return True
    return word in UNITS or ((spaced or joined) and folded in SHORT)
