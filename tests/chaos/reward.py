"""Rewards of the user's own, so that the sweep has reward workers to kill."""

import hashlib
import os
import random
import time

SLOW = "CHAOS_SLOW"
"""Variable with the seed of a run that is slowed at random; see slow.py."""


def even(prompt: str, completion: str, answer: str) -> float:
    """1 for an even number after the mark."""
    if seed := os.environ.get(SLOW):
        time.sleep(0.05 * random.Random(seed + completion).random() ** 2)
    return float(int(completion.rpartition("#### ")[2]) % 2 == 0)


def lottery(prompt: str, completion: str, answer: str) -> float:
    """Another number for another completion: every group has something to teach, whatever the model says."""
    return hashlib.sha256(completion.encode()).digest()[0] / 255
