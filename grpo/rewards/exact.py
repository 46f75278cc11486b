"""The reward for answers in words: 1.0 when the completion's answer is the reference's, as normalised text, else 0.0.

What counts as the answer, of a completion and of a reference alike:

1. With a `####`: the rest of the line behind the last one, before an invented next question (as for `gsm8k`).
2. Within that, or in a text without `####`: what the last `\\boxed{…}` holds. One that never closes is no answer.
3. Without either: the whole text. Who asks for the bare answer gets what the usual exact match compares.

Normalised means: Unicode NFKC (wide letters, ligatures, composed accents), case folded, each run of white space one
space, none at the ends. Punctuation counts: "No." is not "No". Nothing is no answer, nor are over MAX_TEXT characters:
a reference of more is refused.
"""

import re
import unicodedata

from grpo.rewards.gsm8k import BOX, FIRST_TEXT, MARKER, last_box, own_answer

MAX_TEXT = 2_048
"""Longest answer, in characters: putting accents in order takes the square of their number."""
SHRINKS = 4
"""Times that normalisation may make a text shorter: what is longer than this cannot become a reference."""
_SPACES = re.compile(r"\s+")


def exact(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the completion's answer and the reference are the same normalised text, else 0.0. Never raises."""
    text = answer_text(completion)
    return 1.0 if text is not None and text == answer_text(answer) else 0.0


def answer_text(text: str) -> str | None:
    """The normalised answer in a completion or a reference; None if there is none."""
    found: str | None = text
    if MARKER in text:
        own = own_answer(text, MARKER, FIRST_TEXT)
        found = (own[own.rfind(MARKER) + len(MARKER) :].splitlines() or [""])[0]
    elif BOX in text:
        found = own_answer(text, BOX, FIRST_TEXT)
    if found is not None and BOX in found:
        found = last_box(found)
    return (normalised(found) or None) if found is not None else None


def normalised(text: str) -> str:
    """NFKC, case folded, white space runs as one space; "" for what is too long."""
    text = _SPACES.sub(" ", text).strip()
    if len(text) > SHRINKS * MAX_TEXT:
        return ""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = " ".join(folded.split())
    return folded if len(folded) <= MAX_TEXT else ""
