"""The engine core of a fake engine: a process of its own that can be killed and frozen. Lines of JSON in and out.

What it samples follows from the weights, the prompt and the seed alone. Run as a file, standard library only.
"""

import hashlib
import json
import sys


def number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6], "big")


def sample(weights: list[int], token_ids: list[int], seed: int, index: int) -> tuple[list[int], list[float]]:
    """Token ids and their logprobs."""
    drawn = number(weights, token_ids, seed, index)
    ids = [5 + (drawn >> shift) % 40 for shift in range(0, 6 + drawn % 12)]
    return ids, [-(number(weights, token_ids, ids[: place + 1]) % 1000) / 250 for place in range(len(ids))]


def logprobs(weights: list[int], token_ids: list[int]) -> list[float]:
    """Of tokens 1..T-1: the same for the trainer and for an engine with its weights."""
    return [-(number(weights, token_ids[: end + 1]) % 1000) / 100 for end in range(1, len(token_ids))]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "samples" in request:
            answer: object = [
                sample(request["weights"], request["token_ids"], request["seed"], index)
                for index in range(request["samples"])
            ]
        elif "self_test_prompt" in request:
            answer = logprobs(request["weights"], request["self_test_prompt"])
        else:
            answer = "ok"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
