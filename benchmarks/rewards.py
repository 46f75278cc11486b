"""The reward of the benchmarks: cheap, deterministic and different for almost every completion."""

from typing import Any


def share_of_e(prompt: str, completion: str, answer: str) -> float:
    """Share of the letter e among the characters of the completion, 0 to 1."""
    return completion.count("e") / max(len(completion), 1)


def shares_of_e(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """The same as TRL asks for it: of completions that are messages."""
    return [share_of_e("", messages[0]["content"], "") for messages in completions]
