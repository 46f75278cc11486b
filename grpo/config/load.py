"""A YAML file and `key=value` overrides become a Config, or one ConfigError that lists every problem, a line each.

Relative paths in a configuration (`model.path`, `data.source`, `eval.source`, `run.dir`) are relative to the current
directory, as on any command line, not to the file.
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from grpo.config import paths
from grpo.config.renamed import RENAMED
from grpo.config.schema import Config
from grpo.config.yaml import MOST_NESTED, dump, parse, read
from grpo.errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80

MOST_PROBLEMS = 20

_MESSAGES = {
    "int_parsing_size": "must be a whole number of at most 10 digits",
    "model_type": "must be a section of keys",
    "string_type": "must be text; put it in quotes",
    "tuple_type": "must be a list: [a, b], or lines that begin with a dash",
    "invalid_key": "a key must be text",
}

Path_ = tuple[str | int, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, changed by `overrides` such as "train.learning_rate=2e-6".

    An override's value is read as YAML ("null", "[0.9, 0.95]"); for a key that takes text it is the text itself. List
    items are numbered from 0: "rewards.0.weight=0.5". Raises ConfigError with one line for each problem.
    """
    tree = read(path)
    problems: list[Problem] = [problem for override in overrides if (problem := _override(tree, override))]
    # `train:` with nothing below it (all its keys commented out) means the defaults.
    tree = {key: value for key, value in tree.items() if value is not None or key not in Config.model_fields}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems += [partial(_problem, details) for details in found if not _is_echo(details)]
        raise _all_of(problems) from None
    problems += [*_unknown_keys_allowed(config), *paths.problems(config)]
    if problems:
        raise _all_of(problems)
    return config


Problem = str | Callable[[], str]
"""A line, or what makes it: only those that are shown are worth the search for a key that was meant."""


def _all_of(problems: list[Problem]) -> ConfigError:
    """One error of all problems, or of the first MOST_PROBLEMS and the number of the rest."""
    rest = len(problems) - MOST_PROBLEMS
    lines = [problem if isinstance(problem, str) else problem() for problem in problems[:MOST_PROBLEMS]]
    return ConfigError("\n".join(lines + [f"and {rest} more problems"] * (rest > 0)))


def _unknown_keys_allowed(config: Config) -> Iterator[Problem]:
    """A key that does not exist would allow nothing."""
    for place, key in enumerate(config.run.allow_drift):
        path = tuple(key.split("."))
        if _field(path) is None:
            yield partial(_unknown, f"run.allow_drift.{place} = {_show(key)}", path)


def _unknown(what: str, path: Path_) -> str:
    return f"{what}: unknown key; {_suggest(path)}"


def _is_echo(details: ErrorDetails) -> bool:
    """Whether pydantic says once more, of a list, that one of its items was wrong."""
    return details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]


def config_schema() -> dict[str, object]:
    """JSON schema of a configuration, with the description of every key."""
    return Config.model_json_schema()


def dump_config(config: Config) -> str:
    """YAML with every key of the configuration; `load_config` of it gives an equal Config."""
    return dump(config.model_dump(mode="json"))


def _override(tree: dict[object, object], override: str) -> str | None:
    """Writes one override into the tree; returns what is wrong with it, if anything."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"{_show(override)}: an override must read key=value, for example train.learning_rate=2e-6"
    if len(keys) > MOST_NESTED:
        return f"{_show(override)}: a key has at most {MOST_NESTED} parts; see `grpo config schema`"
    here: object = tree
    for depth, key in enumerate(keys):
        if isinstance(here, list):
            if not (re.fullmatch("[0-9]{1,9}", key) and int(key) <= len(here)):
                name = _dotted(keys[:depth])
                return f"{_show(override)}: {name} has {len(here)} items, numbered from 0; {_show(key)} is not one"
            here.extend([None] * (int(key) == len(here)))
            here[int(key)] = below = _below(here[int(key)], keys, depth, text)
        elif isinstance(here, dict):
            here[key] = below = _below(here.get(key), keys, depth, text)
        else:
            return f"{_show(override)}: {_dotted(keys[:depth])} is {_show(here)} in the file and has no keys"
        here = below
    return None


def _below(found: object, keys: list[str], depth: int, text: str) -> object:
    """What stands at keys[depth] once the override is written: at the end its value, before that what was found."""
    if depth == len(keys) - 1:
        return _value(keys, text)
    return _empty(keys[: depth + 1]) if found is None else found


def _value(keys: list[str], text: str) -> object:
    field = _field(tuple(keys))
    if field and (field.annotation is str or str in get_args(field.annotation)):
        optional = type(None) in get_args(field.annotation)
        return None if optional and text in ("null", "~", "") else text
    try:
        return parse(text)
    except yaml.YAMLError:
        return text  # the check against Config says what it should have been


def _empty(keys: list[str]) -> object:
    """What an override starts from when the file has nothing there: no keys, or the default list."""
    field = _field(tuple(keys))
    if field and get_origin(field.annotation) is tuple and not keys[-1].isdecimal():
        return [item.model_dump() if isinstance(item, BaseModel) else item for item in field.default]
    return {}


def _problem(details: ErrorDetails) -> str:
    """One line: the path, the value, what it must be, what the key is."""
    kind, path, value = details["type"], details["loc"], details["input"]
    if kind == "extra_forbidden":
        while isinstance(value, dict) and len(value) == 1:
            path, value = (*path, *value), next(iter(value.values()))
        return _unknown(f"{_dotted(path)} = {_show(value)}", path)
    if kind == "string_unicode":
        section = _dotted(path) or "the configuration"
        return f"{section}: a key must be whole Unicode text, but {_show(value)} has half a surrogate pair; remove it"
    if not path:
        return str(details["ctx"]["error"])  # a combination of keys; the text names them
    field = _field(path)
    meaning = f" ({field.description.rstrip('.')})" if field and field.description else f"; {_keys(path)}"
    if kind == "missing":
        return f"{_dotted(path)}: missing{meaning}"
    message = _MESSAGES.get(kind) or details["msg"].partition(", unable to parse")[0]
    if kind == "value_error":
        message = str(details["ctx"]["error"])
    for start in ("Input should", "String should", "Value should", "Tuple should"):
        message = message.replace(start, "must")
    return f"{_dotted(path)} = {_show(value)}: {message}{meaning}"


def _suggest(path: Path_) -> str:
    """The nearest key: in the same section, with the whole path, or of the same name elsewhere; else what there is."""
    if new := RENAMED.get(".".join(key for key in path if isinstance(key, str))):
        return f"it is now called {new}" if _field(tuple(new.split("."))) else new
    section, leaves = path[:-1], list(_leaves(Config))
    near = [_dotted((*section, name)) for name in difflib.get_close_matches(str(path[-1]), _names(section), n=1)]
    namesakes = [leaf for leaf in leaves if leaf.rpartition(".")[2] == str(path[-1])]
    near = near or ([] if section else namesakes)  # a key without its section may be any of them
    near = near or difflib.get_close_matches(_dotted(path), leaves, n=1, cutoff=0.75) or namesakes
    if near:
        return f"did you mean {' or '.join(near)}?"
    return _keys(section) if _names(section) else _keys(())


def _dotted(path: Sequence[object]) -> str:
    return ".".join(_show(key) if isinstance(key, str) else str(key) for key in path)


def _keys(section: Path_) -> str:
    return f"{_dotted(section) or 'a configuration'} has the keys {', '.join(_names(section))}"


def _names(section: Path_) -> list[str]:
    model = _model(section)
    return list(model.model_fields) if model else []


def _model(path: Path_) -> type[BaseModel] | None:
    """The class of a section: of () it is Config, of ("rewards", 0) it is RewardFunction."""
    if not path:
        return Config
    return _section_of(_field(path[:-1] if isinstance(path[-1], int) else path))


def _section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The class of the section, or of the list's sections, that a key holds; None if it holds a value."""
    kind = field.annotation if field else None
    kinds = get_args(kind)[:1] if get_origin(kind) is tuple else get_args(kind) or (kind,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _field(path: Path_) -> FieldInfo | None:
    """The declaration of a key, or None for a key that does not exist; list indices are passed over."""
    keys = [key for key in path if isinstance(key, str) and not key.isdecimal()]
    section: type[BaseModel] | None = Config
    field = None
    for key in keys:
        field = section.model_fields.get(key) if section else None
        section = _section_of(field)
    return field


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _show(value: object) -> str:
    """A value as a user would write it, on one line and short."""
    if isinstance(value, str) and value and value.isprintable() and len(value) <= 80:
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = " ".join(_SHORT.repr(value).split())
        return text if len(text) <= 120 else f"{text[:120]}..."
    except ValueError:  # an integer of more digits than Python likes to print
        return f"a very large {type(value).__name__}"
