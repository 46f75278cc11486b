"""A reward of the user's own, so that the sweep has reward workers to kill."""


def even(prompt: str, completion: str, answer: str) -> float:
    """1 for an even number after the mark."""
    return float(int(completion.rpartition("#### ")[2]) % 2 == 0)


def parity(prompt: str, completion: str, answer: str) -> float:
    """1 for a completion of an odd number of letters and digits: every group has both."""
    return float(sum(map(str.isalnum, completion)) % 2)
