"""Text of a row never becomes a control token: what spells one is tokenised as the text that it is.

The configuration may spell them (`data.prompt_format`, `data.system_prompt`, its template): they are meant there.
Before rendering, each spelling in a row gives way to a stand-in of private characters, which no template knows; behind
it the control tokens are written under secret names, for a copy of the tokenizer that knows them by these names alone.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BEGIN, END, SECRET = "\U000f0000", "\U000ffffc", "\U000ffffd"
FIRST = 0xF0001
PRIVATE = (BEGIN, END, SECRET)
"""Private characters: a stand-in is BEGIN, one that counts from FIRST, and END; a secret name ends in SECRET."""
BRACKETED = re.compile(r"[<\[{|｜].*[>\]}|｜]", re.DOTALL)


class ControlTokens:
    """Those that the tokenizer calls special, and those in brackets that the chat template writes (`<tool_call>`)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str = "") -> None:
        self.tokenizer = tokenizer
        self.ids = {
            added.content: token
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.content.strip()
            and (added.special or (added.content in template and BRACKETED.fullmatch(added.content)))
        }
        self._known = frozenset(self.ids.values())
        self._names = [*sorted(self.ids, key=lambda name: (-len(name), name)), *PRIVATE]
        self._places = {name: place for place, name in enumerate(self._names)}
        self._spelt = re.compile("|".join(map(re.escape, self._names)))
        special = [added.content for added in tokenizer.added_tokens_decoder.values() if added.special]
        self._special = re.compile("|".join(re.escape(name) for name in self._names if name in {*special, *PRIVATE}))
        self._rendered = re.compile(f"{BEGIN}(.){END}|{self._spelt.pattern}", re.DOTALL)

    def hide(self, value: Any, by_model: bool = False) -> Any:
        """The text, or a message with all texts in it, with stand-ins for what is spelt there.

        `by_model`: what an assistant said keeps what is not special, as it has thoughts and calls that templates read.
        """
        if isinstance(value, str):
            spelt = self._special if by_model else self._spelt
            return spelt.sub(lambda found: f"{self._private(found[0])}{END}", value)
        if isinstance(value, dict):
            by_model = value.get("role") == "assistant" or by_model
            return {key: self.hide(item, by_model) for key, item in value.items()}
        return [self.hide(item, by_model) for item in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """The rendered text with what is spelt in the place of its stand-ins."""
        return self._rendered.sub(lambda found: self._names[ord(found[1]) - FIRST] if found[1] else found[0], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts with stand-ins: those spell text, all other control tokens are meant.

        Raises TypeError for a tokenizer of which no such copy can be made.
        """
        texts = [self._rendered.sub(self._meant, text) for text in texts]
        try:
            return [list(one.ids) for one in self._copy.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # a plain one, for a text that it has no tokens for
            raise TypeError(str(error)) from error

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """The control tokens among them, in order."""
        return [token for token in token_ids if token in self._known]

    def _private(self, name: str) -> str:
        return f"{BEGIN}{chr(FIRST + self._places[name])}"

    def _meant(self, found: re.Match[str]) -> str:
        return self._names[ord(found[1]) - FIRST] if found[1] else self._secret(found[0])

    def _secret(self, name: str) -> str:
        return f"{self._private(name)}{SECRET}" if name in self.ids else name

    @cached_property
    def _copy(self) -> "Tokenizer":
        """The tokenizer with control tokens of the same ids under their secret names."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError("the tokenizer has no fast form")
        from tokenizers import Tokenizer

        whole = json.loads(backend.to_str())
        for added in whole["added_tokens"]:
            if added["content"] in self.ids:
                added |= {"content": self._secret(added["content"]), "normalized": False}
        model = whole["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._secret(name): token for name, token in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[self._secret(name), score] for name, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._secret(model["unk_token"])
        whole |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            return Tokenizer.from_str(json.dumps(whole))
        except Exception as error:  # plain ones: merges that make a control token, for example
            raise TypeError(str(error)) from error
