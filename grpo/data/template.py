"""The chat template: which one a run takes, and messages rendered with it. What goes wrong is one sentence about it.

Rendering is the template's code, in Jinja's sandbox: it has a deadline, and it sees the time at which the run began, so
that a run that is resumed on another day makes the same prompts.
"""

import contextlib
import ctypes
import difflib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import Config
from grpo.config.text import first_line, short
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Chat = list[Message]
"""Messages with `role` and `content`, and what else a row gave them."""

LARGEST_FILE = 1 << 20
RENDER_SECONDS = 60.0
"""Longest time for all chats of one call: a template that loops for ever would otherwise hold the run for ever."""
OURS = {"messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message", "strftime_now"}
OURS |= {"return_assistant_tokens_mask", "raise_exception"}
"""Names that rendering itself gives to a template or to its renderer."""


@dataclass(frozen=True)
class Template:
    """A chat template with its variables. `name` is how messages call it, `now` the time that it sees."""

    source: str
    name: str
    variables: Mapping[str, object]
    now: datetime

    def render(self, chats: Sequence[Chat], generation: bool = True) -> list[str | Exception]:
        """Each chat as text, up to the head of the assistant's turn; in the place of one that fails, its exception.

        Raises ConfigError for a template that is no template or takes longer than RENDER_SECONDS.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**self.variables, "strftime_now": self.now.strftime}

        def rendered(some: Sequence[Chat]) -> list[str]:
            texts = render_jinja_template(
                conversations=list(some), chat_template=self.source, add_generation_prompt=generation, **variables
            )[0]
            return [_text(text) for text in texts]

        def each() -> list[str | Exception]:
            try:
                return list(rendered(chats))
            except Exception:  # a template is code: it raises whatever it likes
                return [_one(rendered, chat) for chat in chats]

        return self._in_time(each)

    def _in_time(self, work: Callable[[], list[str | Exception]]) -> list[str | Exception]:
        done: list[list[str | Exception]] = []

        def rendering() -> None:
            with contextlib.suppress(SystemExit):  # how it is told to end
                done.append(work())

        thread = threading.Thread(target=rendering, name="chat-template", daemon=True)
        thread.start()
        thread.join(RENDER_SECONDS)
        if not done and thread.ident is not None and thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            raise ConfigError(f"{self.name} takes more than {RENDER_SECONDS:g} s; {WAY_OUT}")
        return done[0]

    def refusal(self, error: Exception, chat: Chat) -> ConfigError:
        """What to say of a template that renders no chat at all, such as this one."""
        if any(message["role"] == "system" for message in chat):
            without = [message for message in chat if message["role"] != "system"]
            if isinstance(self.render([without])[0], str):
                return ConfigError(
                    f"data.system_prompt: {self.name} refuses a system message ({said(error)}); put the instruction "
                    "into data.prompt_format and remove data.system_prompt (or the system messages of the rows)"
                )
        return ConfigError(f"{self.name} cannot be rendered ({said(error)}); {WAY_OUT}")

    def unused(self) -> list[str]:
        """A sentence for each of data.chat_template_kwargs that the template never reads."""
        from transformers.utils.chat_template_utils import _get_template_variables

        read = _get_template_variables(self.source)
        asked = [name for name in self.variables if name not in read]
        return [
            f"data.chat_template_kwargs.{name}: {self.name} never reads it{_near(name, read)}"
            for name in asked
            if name not in self._own
        ]

    _own: frozenset[str] = frozenset()
    """Variables that the tokenizer gives, its special tokens; nobody has asked for them."""


WAY_OUT = "give a template that works in a file with data.chat_template, or its variables in data.chat_template_kwargs"


def said(error: Exception) -> str:
    """The kind and the first line of what a template raised, and the line of it that is meant, where that is known."""
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}: {first_line(error)}" + (f", line {line}" if line else "")


def choose_template(config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime) -> Template | None:
    """The template of data.chat_template or else the tokenizer's; None where there is none. Raises ConfigError."""
    source, name = _source(config, getattr(tokenizer, "chat_template", None))
    asked = config.data.chat_template_kwargs
    if source is None:
        if asked:
            raise ConfigError(
                f"data.chat_template_kwargs: the tokenizer of {config.model.path} has no chat template; set "
                "data.chat_template or remove them"
            )
        return None
    if taken := sorted(OURS & set(asked)):
        raise ConfigError(f"data.chat_template_kwargs.{taken[0]}: is set by the program itself; remove it")
    own = tokenizer.special_tokens_map
    template = Template(source, name, {**own, **asked}, now, frozenset(own) - set(asked))
    _compile(template)
    return template


def _compile(template: Template) -> None:
    from transformers.utils.chat_template_utils import _get_template_variables

    try:
        _get_template_variables(template.source)
    except Exception as error:  # Jinja compiles to Python, whose compiler has its own objections
        raise ConfigError(f"{template.name} is not a template ({said(error)}); {WAY_OUT}") from error


def _source(config: Config, own: object) -> tuple[str | None, str]:
    """The text of the template and its name in messages. `own` is the tokenizer's: a text, texts by name, or None."""
    wanted, path = config.data.chat_template, config.model.path
    named = own if isinstance(own, dict) else {"default": own} if isinstance(own, str) and own else {}
    names = ", ".join(sorted(map(short, named)))
    if wanted is None:
        if named and "default" not in named:
            raise ConfigError(
                f"data.chat_template: the tokenizer of {path} has the templates {names} and none of them is the "
                "default; name one"
            )
        return named.get("default"), f"model.path: the chat template of {path}"
    if wanted in named:
        return named[wanted], f"data.chat_template: the template {wanted} of {path}"
    if "{{" in wanted or "{%" in wanted:
        raise ConfigError("data.chat_template: must be a file or a name, found a template itself; write it to a file")
    return _read(Path(wanted), names), f"data.chat_template: {wanted}"


def _read(path: Path, names: str) -> str:
    try:
        if os.stat(path).st_size > LARGEST_FILE or not path.is_file():
            raise ConfigError(
                f"data.chat_template: {path} must be a file of at most {LARGEST_FILE >> 20} MiB; name a template"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        also = f"one of the tokenizer's templates ({names})" if names else "a name only where the tokenizer has some"
        raise ConfigError(
            f"data.chat_template: there is no file {path} in {Path.cwd()}; give a file, or {also}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"data.chat_template: {path} cannot be read ({error.strerror}); check the file and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.chat_template: {path} is not UTF-8 ({error.reason} at byte {error.start + 1}); write it in UTF-8"
        ) from error
    if not text.strip():
        raise ConfigError(f"data.chat_template: {path} is empty; write the template into it")
    return text


def _one(rendered: Callable[[Sequence[Chat]], list[str]], chat: Chat) -> str | Exception:
    try:
        return rendered([chat])[0]
    except Exception as error:  # as above
        return error


def _text(text: str) -> str:
    text.encode()  # a template can cut a character into halves: UnicodeEncodeError
    return text


def _near(name: str, read: frozenset[str]) -> str:
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, read, n=1))
