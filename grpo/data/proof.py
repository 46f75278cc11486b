"""What is proved on the finished prompt: the texts that went in stand in it, it is open at its end, it begins once.

Templates strip, escape and change case; tokenizers normalise: a text stands in another if it does so without all that.
"""

import html
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grpo.data.template import Chat, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "an answer that stands nowhere else"
MOST_BLANKS = 4
"""Tokens of white space that may stand between a prompt's end, or its beginning, and a control token that counts."""
THOUGHT = "</think>"
UNSEEN = dict.fromkeys([*range(33), 127])


def plain(text: str) -> str:
    """The text without what templates and tokenizers may change: case, accents, compatible forms, white space."""
    if text.isascii():
        return text.casefold().translate(UNSEEN)
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join("".join(char for char in text if unicodedata.category(char)[0] not in "MC").split())


def stands(text: str, prompt: str) -> bool:
    """Whether the text stands in the prompt, as it is, escaped for HTML or JSON, or up to what `plain` takes away."""
    if text.strip() in prompt:
        return True
    whole = plain(prompt)
    spelt = [text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
    return any(plain(form) in whole for form in spelt) or plain(text) in plain(html.unescape(prompt))


def share_kept(text: str, prompt: str) -> float:
    """Share of the text's characters that stand in the prompt at all, in any order."""
    wanted = Counter(plain(text))
    return sum((wanted & Counter(plain(prompt))).values()) / max(1, wanted.total())


def texts_of(chat: Chat) -> list[tuple[str, str]]:
    """The role and the text of each message that the prompt must hold; of what an assistant said, not its thoughts."""
    texts = [(str(message["role"]), str(message["content"])) for message in chat if message["role"] != "tool"]
    return [(role, text.rpartition(THOUGHT)[2] if role == "assistant" else text) for role, text in texts]


def missing_head(template: Template, chat: Chat) -> str | None:
    """The head of the assistant's turn where a template does not write it behind a prompt, though asked to."""
    asked, bare = template.render([chat])[0], template.render([chat], generation=False)[0]
    (answered,) = template.render([[*chat, {"role": "assistant", "content": MARK}]], generation=False)
    if asked != bare or not (isinstance(asked, str) and isinstance(answered, str)) or MARK not in answered:
        return None
    head, end = answered[: answered.index(MARK)].rstrip(), asked.rstrip()
    return head[len(end) :] if head.startswith(end) and head != end else None


class Ends:
    """The two ends of a prompt: begun once, and not ended."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.blank: Callable[[int], bool] = lru_cache(lambda token: not str(tokenizer.decode([token])).strip())

    def begun_once(self, ids: list[int]) -> list[int]:
        """Without the first of two BOS that have nothing but white space between them."""
        while self.bos is not None and ids[:1] == [self.bos]:
            place = self._first_that_counts(ids[1 : 2 + MOST_BLANKS])
            if place is None or ids[1 + place] != self.bos:
                break
            ids = ids[1 + place :]
        return ids

    def is_ended(self, ids: Sequence[int]) -> bool:
        """Whether EOS stands behind it, with nothing but white space in between."""
        tail = list(ids[: -2 - MOST_BLANKS : -1])
        place = self._first_that_counts(tail)
        return self.eos is not None and place is not None and tail[place] == self.eos and len(ids) > 1

    def _first_that_counts(self, ids: Sequence[int]) -> int | None:
        return next((place for place, token in enumerate(ids) if not self.blank(token)), None)


def before_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """What the tokenizer itself writes before a text, such as BOS; what it writes behind would end the prompt."""
    whole, bare = (_ids(tokenizer, text, special) for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, special: bool) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(ids)
