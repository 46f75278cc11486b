"""What values.yaml says about its values: `# -- text` above a key, in the format of helm-docs."""

import re

_KEY = re.compile(r"( *)([\w.-]+):")


def descriptions(values: str) -> dict[str, str]:
    """Text by dotted path ("head.shmSize") of every commented key of a values file."""
    found: dict[str, str] = {}
    path: list[str] = []
    text: list[str] = []
    for line in values.splitlines():
        comment = line.strip()
        if comment.startswith("# -- "):
            text = [comment[5:]]
        elif comment.startswith("# ") and text:
            text.append(comment[2:])
        elif key := _KEY.match(line):
            path = [*path[: len(key[1]) // 2], key[2]]
            if text:
                found[".".join(path)] = " ".join(text)
            text = []
        else:
            text = []
    return found
