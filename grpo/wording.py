"""How foreign text stands in a message: printable, short, on one line."""


def first_line(error: BaseException) -> str:
    """What it says, on one printable line."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__), most=300)


def short(name: str, most: int = 80) -> str:
    """A name from a file, which may hold anything, as it can stand in a message."""
    return name if name.isprintable() and len(name) <= most else f"{ascii(name[:most])[1:-1]}..."
