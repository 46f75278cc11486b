"""How foreign text stands in a message: printable, short, on one line."""

import unicodedata

# Controls, formats such as bidi marks, surrogates, private and unassigned characters, line and paragraph separators
STEERING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def first_line(error: BaseException) -> str:
    """What it says, on one printable line."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__), most=300)


def short(name: str, most: int = 80) -> str:
    """A name from a file, which may hold anything, as it can stand in a message."""
    return name if name.isprintable() and len(name) <= most else f"{ascii(name[:most])[1:-1]}..."


def clean(text: str) -> str:
    """The text on one line, with everything that could steer a terminal written as an escape (`\\x1b`, `\\u202e`)."""
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in STEERING else char for char in text)
