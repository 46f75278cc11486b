"""What is asked of a reward service, and how its reply is read: pure functions between records and JSON."""

import json
import math
import re
from collections.abc import Mapping

from grpo.config import Judge, RewardFunction
from grpo.types import Prompt

LONGEST_VERDICT = 100_000
"""Characters of a judge's reply that are searched, from its end."""


class BadReply(Exception):
    """The service answered, but not with a reward; the text completes "the service …"."""


def address(reward: RewardFunction) -> str:
    """Where requests go."""
    assert reward.url is not None, "only a reward with a url is asked over the network"
    return f"{reward.url.rstrip('/')}/chat/completions" if reward.judge else reward.url


def request_body(reward: RewardFunction, prompt: Prompt, completion: str) -> bytes:
    """The JSON of a request: equal for equal questions, so that its digest can name it."""
    texts = {"question": prompt.question, "completion": completion, "answer": prompt.answer}
    body: Mapping[str, object]
    if reward.judge is None:
        body = {"prompt": prompt.question, "completion": completion, "answer": prompt.answer}
    else:
        body = {
            "model": reward.judge.model,
            # in one pass: a completion that spells {answer} stays as it is
            "messages": [
                {
                    "role": "user",
                    "content": re.sub(r"\{(question|completion|answer)\}", lambda m: texts[m[1]], reward.judge.prompt),
                }
            ],
            "temperature": reward.judge.temperature,
            "max_tokens": reward.judge.max_tokens,
        }
    return json.dumps(body, sort_keys=True).encode()


def read_reply(reward: RewardFunction, content: bytes) -> float:
    """The reward in a reply. Raises BadReply."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError):
        raise BadReply(f"answered with something else than JSON: {shown(content)}") from None
    if reward.judge is not None:
        return _verdict(reward.judge, _message(reply))
    value = reply.get("reward") if isinstance(reply, dict) else None
    number = _finite(value)
    if number is None:
        raise BadReply(f'must answer {{"reward": a finite number}}, but answered {shown(content)}')
    return number


def _message(reply: object) -> str:
    """The text of a chat completion."""
    try:
        choice = reply["choices"][0]  # type: ignore[index]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadReply("must answer with a chat completion, but its reply has no choices[0].message.content") from None
    if not isinstance(text, str):
        raise BadReply(f"must answer with text, but its message is {type(text).__name__}")
    if reason == "length":
        raise BadReply("was cut before its verdict: raise judge.max_tokens")
    return text


def _verdict(judge: Judge, text: str) -> float:
    """The last match of `judge.score`, as a share of `judge.scale`."""
    found = [match[1] for match in re.finditer(judge.score, text[-LONGEST_VERDICT:])]
    if not found or found[-1] is None:
        raise BadReply(f"gave no verdict that judge.score finds: {ascii(text[-200:])}")
    words = {word.casefold(): value for word, value in judge.words.items()}
    word = found[-1].strip().casefold()
    if word in words:
        return words[word]
    low, high = judge.scale
    number = _finite(_number(word))
    if number is None or not low <= number <= high:
        raise BadReply(
            f"gave the verdict {ascii(found[-1][:100])}, no number within judge.scale and none of judge.words"
        )
    return (number - low) / (high - low)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _finite(value: object) -> float | None:
    """As a float, if it is a number that one can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def shown(content: bytes) -> str:
    """The beginning of a reply, safe for a terminal."""
    return ascii(content[:200].decode(errors="replace"))
