"""The reward of the benchmark: cheap, deterministic and different for almost every completion."""


def share_of_e(prompt: str, completion: str, answer: str) -> float:
    """Share of the letter e among the characters of the completion, 0 to 1."""
    return completion.count("e") / max(len(completion), 1)
