"""Rewards of the user's own, so that the sweep has reward workers to kill."""

import hashlib


def even(prompt: str, completion: str, answer: str) -> float:
    """1 for an even number after the mark."""
    return float(int(completion.rpartition("#### ")[2]) % 2 == 0)


def lottery(prompt: str, completion: str, answer: str) -> float:
    """Another number for another completion: every group has something to teach, whatever the model says."""
    return hashlib.sha256(completion.encode()).digest()[0] / 255
