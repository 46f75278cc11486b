"""Rewards of one's own: named in a run's file as `examples.rewards:mentions_answer`."""

import re


def mentions_answer(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the right number stands anywhere in the completion: a signal before a model knows the form."""
    right = answer.rsplit("####", 1)[-1].strip().replace(",", "")
    return float(right in re.findall(r"\d+(?:\.\d+)?", completion[:10_000].replace(",", "")))
