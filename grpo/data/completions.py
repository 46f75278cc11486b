"""What a supervised warm-up teaches behind a prompt: the row's completion as the chat template writes it, and its end.

The prompt's ids are those that a rollout begins with, and the completion's come behind them, up to the token at which
an engine would stop. What a template writes behind that, such as a line break, no policy ever writes.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from grpo.config.text import short
from grpo.data.generation import end_tokens
from grpo.data.problem import Problem
from grpo.data.proof import before_of, stands, texts_of
from grpo.data.rendering import ROWS_PER_BATCH, Ids, Rendering
from grpo.data.rows import Row
from grpo.data.template import Chat, Message, said
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTES = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
"""The calculator's notes in GSM8K: 48/2 = <<48/2=24>>24."""
FINAL = re.compile(r"^[ \t]*####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
"""GSM8K's last line."""

MARK = "e5b1c0de-an-answer-0b5e7a11"
EMPTY = Problem("", "is empty without its calculator notes; fill it in or remove the row")


def formatted(text: str, form: Literal["as_is", "gsm8k", "boxed"]) -> str:
    """A completion as `sft.format` says."""
    if form == "as_is":
        return text
    text = NOTES.sub("", text)
    return text if form == "gsm8k" else FINAL.sub(lambda found: f"\\boxed{{{found[1]}}}", text)


class Completions:
    """Makes the ids of completions, by the rendering that has made those of the prompts."""

    def __init__(self, rendering: Rendering, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises ConfigError for a model whose completions nothing ends."""
        self.rendering, self.tokenizer, self.config = rendering, tokenizer, rendering.config
        self.ends = end_tokens(self.config, tokenizer)

    def encode(self, rows: Sequence[Row], prompts: Sequence[Ids | Problem]) -> list[Ids | Problem]:
        """The completion's ids of each row, end token included, or why it has none; of no prompt none."""
        made: list[Ids | Problem] = []
        for start in range(0, len(rows), ROWS_PER_BATCH):
            some, theirs = rows[start : start + ROWS_PER_BATCH], prompts[start : start + ROWS_PER_BATCH]
            chats = [self._hidden(row) for row in some]
            texts = self._texts(chats)
            for row, text, prompt in zip(some, texts, theirs, strict=True):
                if isinstance(prompt, Problem) or isinstance(text, Problem):
                    made.append(prompt if isinstance(prompt, Problem) else text)  # type: ignore[arg-type]
                else:
                    made.append(self._ids(row, text, prompt))
        return made

    def _hidden(self, row: Row) -> tuple[Chat, Message]:
        """The prompt's messages and the answer, with stand-ins for control tokens that the row spells."""
        answer = {"role": "assistant", "content": formatted(row.completion, self.config.sft.format)}
        control = self.rendering.control
        if control is None:
            return self.rendering.compose(row.conversation), answer
        hidden = [control.hide(message) for message in row.conversation]
        return self.rendering.compose(hidden), control.hide(answer)

    def _texts(self, chats: Sequence[tuple[Chat, Message]]) -> list[tuple[str, str] | Problem]:
        """The prompt and what is written behind it, as text, without white space behind the answer's end."""
        template = self.rendering.template
        if template is None:
            alone = self.rendering.by_library
            plain = [("" if alone else str(chat[-1]["content"]), str(answer["content"])) for chat, answer in chats]
            return [both if both[1].strip() else EMPTY for both in plain]
        prompts = template.render([chat for chat, _ in chats])
        wholes = template.render([[*chat, answer] for chat, answer in chats], generation=False)
        tails = self._tails(chats, prompts, wholes)
        texts: list[tuple[str, str] | Problem] = []
        for (_, answer), prompt, whole, tail in zip(chats, prompts, wholes, tails, strict=True):
            if not answer["content"].strip():
                texts.append(EMPTY)
            elif isinstance(prompt, str) and isinstance(whole, str):
                texts.append((prompt, self._behind(prompt, whole, str(answer["content"]), tail)))
            else:
                error = whole if isinstance(whole, Exception) else prompt
                refused = f"refuses a conversation that ends with an answer ({said(error)})"  # type: ignore[arg-type]
                cause = ConfigError(f"{template.name} {refused}; give another one with data.chat_template")
                texts.append(Problem("", f"the chat template {refused}; correct the row", cause))
        return texts

    def _tails(
        self,
        chats: Sequence[tuple[Chat, Message]],
        prompts: Sequence[str | Exception],
        wholes: Sequence[str | Exception],
    ) -> list[str]:
        """What the template writes behind each answer that it begins otherwise than a prompt ends; else "".

        By an answer that nothing else spells: one of few letters may stand in the name of an end token too.
        """
        odd = [not str(whole).startswith(str(prompt)) for prompt, whole in zip(prompts, wholes, strict=True)]
        marked = [
            [*chat, {**answer, "content": MARK}] for (chat, answer), other in zip(chats, odd, strict=True) if other
        ]
        assert self.rendering.template
        made = iter(self.rendering.template.render(marked, generation=False) if marked else [])
        return [(str(next(made)) if other else MARK).partition(MARK)[2] for other in odd]

    def _behind(self, prompt: str, whole: str, content: str, tail: str) -> str:
        """What the template writes behind the prompt; where it begins an answer otherwise, the answer and its end."""
        if not whole.startswith(prompt):
            self._note("the chat template writes an answer otherwise than it begins one: it stands behind the prompt")
            return content + tail.rstrip()
        text, blank = whole[len(prompt) :], whole.rpartition(content.strip())[2]
        return text[: -len(blank)] if blank and not blank.strip() else text

    def _ids(self, row: Row, texts: tuple[str, str], prompt: Ids) -> Ids | Problem:
        """The completion's ids, up to its end token."""
        ids = self._tokenised(texts, prompt)
        if isinstance(ids, Problem):
            return ids
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if end is None:
            while ids and self.rendering.template and not self.rendering.decode(ids[-1:]).strip():
                ids = ids[:-1]  # the template's line break
            ids = (*ids, self.ends[0])
            if self.rendering.template:
                name = self.rendering.decode(self.ends[:1])
                self._note(f"the chat template ends an answer with no token that the engine stops at: {name} is added")
        else:
            ids = ids[: end + 1]
        return self._proved(row, ids)

    def _proved(self, row: Row, ids: Ids) -> Ids | Problem:
        """The ids as they are, if the completion stands in them."""
        seen, text = self.rendering.decode(ids), formatted(row.completion, self.config.sft.format)
        ((_, wanted),) = texts_of([{"role": "assistant", "content": text}])
        if stands(wanted, seen):
            return ids
        who = "what the assistant says does not stand in what is taught"
        cause = ConfigError(f"{who}: it would be {short(seen, most=120)!r}; give another data.chat_template")
        return Problem("", f"{who}, {short(seen, most=60)!r}; correct the row or the chat template", cause)

    def _tokenised(self, texts: tuple[str, str], prompt: Ids) -> Ids | Problem:
        """Ids that go on from the prompt's: of both together, or alone where a token would span the border."""
        before, behind = texts
        try:
            whole = self._encoded(before + behind) if before else []
            if tuple(whole[: len(prompt)]) == prompt and len(whole) > len(prompt):
                return tuple(whole[len(prompt) :])
            alone = tuple(self._encoded(behind, begins=False))
        except TypeError as error:
            return Problem("", f"spells a control token, which this tokenizer cannot take as text ({error}); remove it")
        wanted = self.rendering.decode(prompt) + self._shown(behind)
        if not whole or stands(wanted, self.rendering.decode([*prompt, *alone])):
            return alone
        text = "the tokenizer writes no completion behind this prompt without changing it"
        return Problem("", f"{text}; end the prompt with a line break", ConfigError(f"model.path: {text}"))

    def _shown(self, text: str) -> str:
        return self.rendering.control.show(text) if self.rendering.control else text

    def _encoded(self, text: str, begins: bool = True) -> list[int]:
        """Ids of rendered text, as the rendering makes a prompt's; `begins`: with what stands before a whole one."""
        control, rendering = self.rendering.control, self.rendering
        hidden = control is not None and control.show(text) != text
        ids = control.encode([text])[0] if hidden and control else rendering.ids_of([text])[0]
        if not begins:
            return list(ids)
        first = [] if rendering.template else before_of(self.tokenizer, self._shown(text))
        return rendering.ends.begun_once([*first, *ids])

    def _note(self, text: str) -> None:
        self.rendering.notes += [text] * (text not in self.rendering.notes)
