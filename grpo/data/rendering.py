"""Conversations to token ids: rendered, tokenised once, and proved on what results."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from grpo.config import Config
from grpo.config.text import short
from grpo.data.control import ControlTokens
from grpo.data.problem import Problem
from grpo.data.proof import Ends, before_of, missing_head, share_kept, stands, texts_of
from grpo.data.template import WAY_OUT, Chat, Message, choose_template, said
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BATCH = 1024
"""Rows that are tokenised together: a fast tokenizer shares them among the cores."""
CHARACTERS_PER_TOKEN = 1000
"""More than any token stands for: a row of many megabytes is refused before it is tokenised."""
TRIED_TWICE = 8
"""Chats that are rendered a second time, to see whether the template writes the same again."""

Ids = tuple[int, ...]


class Rendering:
    """How the conversations of a run become prompts: its format, system prompt, chat template and tokenizer.

    `notes` are sentences on what is not wrong and may not be meant.
    """

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime | None = None) -> None:
        """`now` is the time that a template sees. Raises ConfigError for a template that cannot be used."""
        self.config, self.tokenizer, self.now = config, tokenizer, now or datetime.now()
        path, data = config.model.path, config.data
        self.by_library = type(tokenizer).__name__ == "MistralCommonBackend"
        if self.by_library and (data.chat_template or data.chat_template_kwargs):
            raise ConfigError(
                f"data.chat_template: {path} has only a tekken.json, whose library writes prompts without a template; "
                "add the tokenizer.json of the model, or remove data.chat_template and data.chat_template_kwargs"
            )
        self.template = None if self.by_library else choose_template(config, tokenizer, self.now)
        if data.system_prompt is not None and not (self.template or self.by_library):
            raise ConfigError(
                f"data.system_prompt: the tokenizer of {path} has no chat template; write the instruction into "
                "data.prompt_format, or give a template with data.chat_template"
            )
        self.notes = self.template.unused() if self.template else []
        source = self.template.source if self.template else ""
        self.control = None if self.by_library else ControlTokens(tokenizer, source)
        self.ends = Ends(tokenizer)
        self._tried = False
        self._shapes: dict[tuple[str, ...], list[int] | None] = {}

    @property
    def sees_the_time(self) -> bool:
        """Whether what the template writes depends on `now`."""
        return self.template is not None and "strftime_now" in self.template.source

    def identity(self) -> list[object]:
        """What prompts follow from besides their rows."""
        data = self.config.data
        asked = [data.chat_template_kwargs] if data.chat_template_kwargs else []
        return [data.prompt_format, data.system_prompt, self.template.source if self.template else None, *asked]

    def decode(self, token_ids: Sequence[int]) -> str:
        """What the model sees, control tokens included."""
        options: dict[str, Any] = {} if self.by_library else {"clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False, **options))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Ids | Problem]:
        """Token ids of each conversation's prompt, made once, here and nowhere else; or why it has none.

        Raises ConfigError where no conversation can be used and the template or the format is why.
        """
        made: list[Ids | Problem] = []
        for start in range(0, len(conversations), ROWS_PER_BATCH):
            made += self._encode(conversations[start : start + ROWS_PER_BATCH])
        causes = [item.cause for item in made if isinstance(item, Problem)]
        if causes and len(causes) == len(made) and causes[0]:
            raise causes[0]
        good = next((index for index, item in enumerate(made) if not isinstance(item, Problem)), None)
        if good is not None:
            self._try_template(self.compose(conversations[good]))
        return made

    def _encode(self, conversations: Sequence[Sequence[Message]]) -> Iterator[Ids | Problem]:
        chats = [self.compose(conversation) for conversation in conversations]
        if self.by_library:
            ids = [self._by_library(chat) for chat in chats]
            texts: list[str | Problem] = [item if isinstance(item, Problem) else self.decode(item) for item in ids]
        else:
            control = cast(ControlTokens, self.control)
            safe = [[control.hide(message) for message in conversation] for conversation in conversations]
            spelt = [one != list(other) for one, other in zip(safe, conversations, strict=True)]
            hidden = list(map(self.compose, safe))
            rendered = self._render(hidden)
            ids = self._tokenise(hidden, rendered, spelt)
            texts = [control.show(text) if isinstance(text, str) else text for text in rendered]
        for chat, text, item in zip(chats, texts, ids, strict=True):
            yield item if isinstance(item, Problem) else self._proved(chat, str(text), item)

    def compose(self, conversation: Sequence[Message]) -> Chat:
        """With the format around the last message, and the system prompt where the row has none of its own."""
        data = self.config.data
        *before, last = conversation
        question = data.prompt_format.replace("{question}", str(last["content"]))
        own = any(message["role"] in ("system", "developer") for message in before)
        system = [] if data.system_prompt is None or own else [{"role": "system", "content": data.system_prompt}]
        return [*system, *before, {**last, "content": question}]

    def _render(self, chats: Sequence[Chat]) -> list[str | Problem]:
        if self.template is None:
            return [str(chat[0]["content"]) if len(chat) == 1 else self._no_roles() for chat in chats]
        most = self.config.model.max_length * CHARACTERS_PER_TOKEN
        if isinstance(first := self.template.render(chats[:1])[0], str) and len(first) > most:
            raise ConfigError(f"{self._name} writes {len(first)} characters for one prompt; {WAY_OUT}")
        texts: list[str | Problem] = []
        refusal: ConfigError | None = None
        for chat, text in zip(chats, self.template.render(chats), strict=True):
            if isinstance(text, str):
                texts.append(text)
            else:
                refusal = refusal or self.template.refusal(text, chat)
                texts.append(Problem("", f"the chat template refuses it ({said(text)}); correct the row", refusal))
        return texts

    def _no_roles(self) -> Problem:
        text = f"has several messages, but the tokenizer of {self.config.model.path} has no chat template"
        return Problem("", text, ConfigError(f"data.chat_template: a prompt {text}; give a file with one"))

    def _by_library(self, chat: Chat) -> list[int] | Problem:
        tokenizer: Any = self.tokenizer
        try:
            return list(tokenizer.apply_chat_template([chat], tokenize=True, return_dict=False)[0])
        except Exception as error:  # a library's own checks of roles and their order
            text = f"the tokenizer of {self.config.model.path} refuses it ({said(error)})"
            return Problem("", f"{text}; correct the row", ConfigError(f"model.path: of every prompt, {text}"))

    def _tokenise(
        self, chats: Sequence[Chat], texts: Sequence[str | Problem], spelt: Sequence[bool]
    ) -> list[list[int] | Problem]:
        """The texts' ids. Where control tokens are not those of its roles, a row has spelt one: it is done again."""
        control = cast(ControlTokens, self.control)
        places = [place for place, text in enumerate(texts) if isinstance(text, str)]
        common = [place for place in places if not spelt[place]]
        made: list[list[int] | Problem] = [text if isinstance(text, Problem) else [] for text in texts]
        for place, ids in zip(common, self.ids_of([str(texts[place]) for place in common]), strict=True):
            made[place] = ids
        odd = {place for place in common if self._is_odd(chats[place], cast("list[int]", made[place]))}
        again = [place for place in places if spelt[place] or place in odd]
        try:
            encoded = control.encode([str(texts[place]) for place in again]) if again else []
            for place, ids in zip(again, encoded, strict=True):
                made[place] = ids
        except TypeError as error:
            for place in again:
                text = f"spells a control token, which this tokenizer cannot take as text ({error}); remove it"
                made[place] = Problem("", text)
        first = next((str(texts[place]) for place in places), "")
        before = [] if self.template or not places else before_of(self.tokenizer, first)
        return [item if isinstance(item, Problem) else self.ends.begun_once([*before, *item]) for item in made]

    def _is_odd(self, chat: Chat, ids: list[int]) -> bool:
        control = cast(ControlTokens, self.control)
        roles = tuple(str(message["role"]) for message in chat)
        if roles not in self._shapes:
            system = self.config.data.system_prompt or "x"
            *rest, last = [{"role": role, "content": system if role == "system" else "x"} for role in roles]
            try:
                text = self._render([[*rest, *self.compose([last])[-1:]]])[0]
                self._shapes[roles] = control.of(self.ids_of([text])[0]) if isinstance(text, str) else None
            except ConfigError:  # x is none of its words
                self._shapes[roles] = None
        shape = self._shapes[roles]
        return shape is not None and control.of(ids) != shape

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts, without what the tokenizer writes around them. Raises ConfigError where it fails."""
        try:
            made: Any = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        except Exception as error:  # tokenizers raises plain ones: for a word that it does not know
            who = f"model.path: the tokenizer of {self.config.model.path}"
            raise ConfigError(f"{who} fails on a prompt ({said(error)}); {OTHER}") from error
        return cast("list[list[int]]", made)

    def _proved(self, chat: Chat, text: str, ids: list[int]) -> Ids | Problem:
        """The ids as they are, if what went into them stands in them. Raises ConfigError for what is not the row's."""
        if not ids:
            return Problem("", "its prompt has no tokens; set data.prompt_format or data.chat_template")
        if self.ends.is_ended(ids):
            raise self._ended(ids)
        seen = self.decode(ids)
        for role, wanted in texts_of(chat):
            if stands(wanted, seen):
                continue
            by_template = self.template is not None and not stands(wanted, text)
            if wanted == self.config.data.system_prompt and by_template:
                raise ConfigError(
                    f"data.system_prompt: {self._name} leaves it out of the prompt; put the instruction into "
                    "data.prompt_format and remove data.system_prompt, or give another template with data.chat_template"
                )
            if by_template or share_kept(wanted, seen) < 0.5:
                return self._left_out(role, seen, by_template)
            note = "characters that the tokenizer does not know are lost from some prompts"
            self.notes += [note] * (note not in self.notes)
        return tuple(ids)

    def _left_out(self, role: str, seen: str, by_template: bool) -> Problem:
        """Of a row whose text does not stand in its prompt."""
        who = self._name if by_template else f"the tokenizer of {self.config.model.path}"
        shown = f"the prompt would be {short(seen, most=120)!r}"
        cause = ConfigError(f"{who} leaves out what the {role} says: {shown}; {WAY_OUT if by_template else OTHER}")
        what = "cut or changed by the chat template" if by_template else "not known to the tokenizer"
        return Problem("", f"what the {role} says does not stand in the prompt, it is {what}; correct the row", cause)

    def _ended(self, ids: Sequence[int]) -> ConfigError:
        name, shown = self.tokenizer.eos_token, short(self.decode(ids[-20:]), most=60)
        if self.template is None:
            return ConfigError(f"data.prompt_format: must not end with {name}, which ends the prompt; remove it")
        return ConfigError(
            f"{self._name} ends the prompt with {name} (...{shown}) and does not begin the assistant's turn, though "
            f"asked to (add_generation_prompt); {WAY_OUT}"
        )

    def _try_template(self, chat: Chat) -> None:
        """What one prompt tells of the template: whether it begins the assistant's turn, once, and always alike."""
        if self.template is None or self._tried:
            return
        self._tried = True
        once, again = ([self.template.render([chat])[0] for _ in range(TRIED_TWICE)] for _ in range(2))
        if len({str(text) for text in [*once, *again]}) > 1:
            raise ConfigError(f"{self._name} writes another text each time; {WAY_OUT}")
        if head := missing_head(self.template, chat):
            self.notes.append(
                f"{self._name} ignores add_generation_prompt: no prompt ends with the head of the assistant's turn, "
                f"{short(head)!r}; write it in a template of your own (data.chat_template)"
            )
        bos, data = str(self.tokenizer.bos_token or "\0"), self.config.data
        for key, text in (("prompt_format", data.prompt_format), ("system_prompt", data.system_prompt or "")):
            if bos in text and str(once[0]).count(bos) > text.count(bos):
                raise ConfigError(f"data.{key}: must not spell {bos}, which the chat template writes; remove it")

    @property
    def _name(self) -> str:
        return self.template.name if self.template else f"model.path: the tokenizer of {self.config.model.path}"


OTHER = "take the tokenizer that belongs to the model and its data"
