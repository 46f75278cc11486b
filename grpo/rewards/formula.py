"""Where the answer of a completion stands for the reward `math`, as text. Pure; what it means is for `symbolic.py`."""

import re
from collections.abc import Hashable
from decimal import Decimal

from grpo.rewards.gsm8k import BOX, FIRST_TEXT, MARKER, braced, last_box, own_answer, thoughts_end
from grpo.rewards.number import parse_number

LONGEST = 2_000
"""Characters of an answer; a longer text is no answer but prose."""
BARE = 100
"""Characters of a completion that may be an answer and nothing else."""
_STATED = re.compile(r"(?i)(?:\banswer(?: is| =|:)|答案[是为：:]|答えは)(?:\s*:)?[\s*_]*([^\n]+)")
_WRAPPED = re.compile(r"^(?:\$\$?|\\\(|\\\[|[*_`\s])*+(.*?)(?:\$\$?|\\\)|\\\]|[*_`\s.。])*$", re.DOTALL)
_SPELLINGS = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|[,;:! ])"), ""),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\s+"), ""),
)


def answers(completion: str) -> list[str]:
    """What a completion may mean by its answer, the likeliest first; empty if it gives none.

    What the last box holds, and all boxes of the last line that has one; without a box what stands behind the last
    `####`, without that what "the answer is" says, and a short line on its own.
    """
    marker = next((marker for marker in (BOX, MARKER) if _begins(completion, marker)), None)
    text = own_answer(completion, marker, FIRST_TEXT) if marker else completion[thoughts_end(completion, "") :]
    found: list[str] = []
    if marker == BOX:
        content = last_box(text)
        boxes = _boxes(text.rstrip()[text.rstrip().rfind("\n", 0, text.rfind(BOX)) + 1 :])
        found = [] if content is None else [content] + ([", ".join(boxes)] if len(boxes) > 1 else [])
    elif marker == MARKER:
        line = (text[text.rfind(MARKER) + len(MARKER) :].splitlines() or [""])[0]
        found = [stated[1] if (stated := _STATED.search(line)) else line]
    elif stated_all := _STATED.findall(text[-LONGEST:]):
        found = [stated_all[-1]]
    elif len(text.strip()) <= BARE and "\n" not in text.strip():
        found = [text]
    return [plain for answer in found if (plain := unwrapped(answer)) and len(plain) <= LONGEST]


def _begins(completion: str, marker: str) -> bool:
    """Whether this marker leads to the answer: it stands behind the thoughts, or nothing does."""
    other = MARKER if marker == BOX else BOX
    behind = max(thoughts_end(completion, marker), thoughts_end(completion, other))
    return completion.find(marker, behind) >= 0 or (marker in completion and completion.find(other, behind) < 0)


def _boxes(line: str) -> list[str]:
    places = [found.end() for found in re.finditer(r"\\boxed\s?", line)]
    return [content for place in places if (content := braced(line, place)) is not None]


def reference(answer: str) -> str:
    """What the answer column means: the last box of a solution, what stands behind `####`, or all of it."""
    if BOX in answer:
        return unwrapped(last_box(answer) or "")
    return unwrapped(answer[answer.rfind(MARKER) + len(MARKER) :] if MARKER in answer else answer)


def reference_text(answer: str) -> str | None:
    """`reference`; None for one that is empty or far too long. What cannot be understood only a worker finds out."""
    text = reference(answer)
    return text if text and len(text) <= LONGEST else None


def unwrapped(text: str) -> str:
    """Without the dollars, brackets, emphasis and the full stop around it."""
    match = _WRAPPED.match(text[: LONGEST + 50].strip())
    return match[1].strip() if match else ""


def spelled(text: str) -> str:
    """The same for spellings that differ only in how they look."""
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def vote(completion: str) -> Hashable | None:
    """What a completion votes for: its number if it is a plain one, else how its answer is spelled."""
    found = answers(completion)
    return (number(found[0]) or spelled(found[0])) if found else None


def number(text: str) -> Decimal | None:
    """Its plain number; None for a percentage, which may mean a hundredth."""
    return None if "%" in text else parse_number(" ".join(text.split()))
