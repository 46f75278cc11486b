"""The reward `math`: 1.0 when the answer means the reference, whatever it looks like. It runs in fenced workers.

math-verify (https://github.com/huggingface/Math-Verify) reads and compares: fractions, roots, intervals, sets,
matrices, equations, units. Its own time limits are off; the worker's rules. Several answers ("2 or -2", "\\pm 2") are
compared one by one, in any order. An error of the library is raised, so that it is a failed call and never a 0.
"""

import logging
import re

from math_verify import LatexExtractionConfig, parse, verify

from grpo.rewards.formula import answers, number, reference, spelled

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each start that its time limits are off
MOST_ANSWERS = 16
_JOINED = re.compile(r"\\(?:text|mathrm|mbox)\s?\{\s*(?:,?\s*(?:or|and))\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|;")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_NAMED = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?=[^=])")
_MEMBER = re.compile(r"^\s*[A-Za-z]\s*\\in(?![a-z])\s*")
_SET, _TUPLE = re.compile(r"\\\{"), re.compile(r"[(\[]")
_COMPOUND = re.compile(r"\d[A-Za-z]{2,}\.?\d")
"""Of two units: "12hours30minutes"."""
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def math(prompt: str, completion: str, answer: str) -> float:
    """1.0 if one reading of the completion's answer equals the reference, else 0.0.

    Raises ValueError for a reference that cannot be read: a 0 would say that the completion is wrong.
    """
    gold = reference(answer)
    right = any(same(gold, found) for found in answers(completion))
    if not right and not readable(prompt, completion, answer):
        raise ValueError(f"the reference {ascii(answer[-60:])} cannot be read")
    return float(right)


def readable(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the reference is something that an answer can be compared with."""
    gold = reference(answer)
    return float(number(gold) is not None or all(understood(item) for item in several(gold)))


def same(gold: str, found: str) -> bool:
    """Whether two answers mean the same."""
    if spelled(gold) == spelled(found):
        return True
    numbers = number(gold), number(found)
    if None not in numbers:
        return numbers[0] == numbers[1]
    golds, founds = several(gold), several(found)
    if len(golds) != len(founds):
        return len(golds) == 1 == len(founds)
    return one_to_one(golds, founds)


def one_to_one(golds: list[str], founds: list[str]) -> bool:
    """Whether each reference has an answer of its own."""
    left = list(founds)
    for gold in golds:
        for place, found in enumerate(left):
            if alike(gold, found, named=len(golds) > 1):
                del left[place]
                break
        else:
            return False
    return True


def alike(gold: str, found: str, named: bool) -> bool:
    """Whether two single answers are equal; `named`: "x = 2" is 2."""
    gold, found = _MEMBER.sub("", gold), _MEMBER.sub("", found)
    if named:
        gold, found = _NAMED.sub("", gold), _NAMED.sub("", found)
    if spelled(gold) == spelled(found):
        return True
    if _COMPOUND.search(spelled(gold)) or _COMPOUND.search(spelled(found)):  # the library would drop the units
        return False
    kinds = [(bool(_SET.match(text)), bool(_TUPLE.match(text))) for text in (spelled(gold), spelled(found))]
    if set(kinds) == {(True, False), (False, True)}:  # the library takes them for the same
        return False
    golds, founds = understood(gold), understood(found)
    return bool(golds and founds) and bool(
        verify(golds, founds, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    )


def understood(text: str) -> list[object]:
    """What the library makes of it; empty if nothing."""
    return list(parse(f"\\boxed{{{text}}}", _CONFIG, parsing_timeout=None, fallback_mode="no_fallback"))


def several(text: str) -> list[str]:
    """The answers that commas, "or" and "and" outside of brackets separate, and both of a plus or minus."""
    items, depth, begin = [], 0, 0
    text = _JOINED.sub(", ", text.replace("{,}", ""))
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0 and not _THOUSANDS.match(text, place - 1):
            items.append(text[begin:place])
            begin = place + 1
    items.append(text[begin:])
    signs = [item.replace("\\pm", sign) for item in items for sign in ("+-" if "\\pm" in item else "+")]
    return [item.strip() for item in signs if item.strip()][:MOST_ANSWERS] or [text]
