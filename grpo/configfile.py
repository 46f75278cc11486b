"""A YAML file and `key=value` overrides become a Config, or one ConfigError that lists every problem, a line each.

Relative paths in a configuration (`model.path`, `data.source`, `eval.source`, `run.dir`) are relative to the current
directory, as on any command line, not to the file.
"""

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from grpo.config import Config
from grpo.errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80

# PyYAML's constructors let these escape on values such as `!!int ""`; RecursionError comes from deep nesting.
_YAML_LEAKS = (ValueError, LookupError, AttributeError, TypeError, RecursionError)

_MESSAGES = {
    "model_type": "must be a section of keys",
    "string_type": "must be text; put it in quotes",
    "tuple_type": "must be a list: [a, b], or lines that begin with a dash",
    "invalid_key": "a key must be text",
}

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its dates, and without its habit of keeping the last of two equal keys."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                problem = f"the key {key.value!r} is there twice, first in line {first}; keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, changed by `overrides` such as "train.learning_rate=2e-6".

    An override's value is read as YAML ("null", "[0.9, 0.95]"); for a key that takes text it is the text itself. List
    items are numbered from 0: "rewards.0.weight=0.5". Raises ConfigError with one line for each problem.
    """
    tree = _read(path)
    problems = [problem for override in overrides if (problem := _override(tree, override))]
    # `train:` with nothing below it (all its keys commented out) means the defaults.
    tree = {key: value for key, value in tree.items() if value is not None or key not in Config.model_fields}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [line for details in error.errors(include_url=False) if (line := _problem(details))]
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def schema() -> dict[str, Any]:
    """JSON schema of a configuration, with the description of every key."""
    return Config.model_json_schema()


def dump(config: Config) -> str:
    """YAML with every key of the configuration; `load` of it gives an equal Config."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read(path: str | Path) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not usable as YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, *_YAML_LEAKS) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not usable as YAML: {reason}") from None
    if tree is None:
        raise ConfigError(f"{path}: empty; the least it needs is `model: {{path: FOLDER}}`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (`model:` and so on), but it is {_show(tree)}")
    return tree


def _override(tree: dict[Any, Any], override: str) -> str | None:
    """Writes one override into the tree; returns what is wrong with it, if anything."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"{override}: an override must read key=value, for example train.learning_rate=2e-6"
    here: Any = tree
    for depth, key in enumerate(keys):
        if isinstance(here, list):
            if not (key.isdecimal() and int(key) <= len(here)):
                return f"{override}: {_dotted(keys[:depth])} has {len(here)} items, numbered from 0; {key} is not one"
            here.extend([None] * (int(key) == len(here)))
            slot: Any = int(key)
        elif isinstance(here, dict):
            slot = key
        else:
            return f"{override}: {_dotted(keys[:depth])} is {_show(here)} in the file and has no keys"
        if depth == len(keys) - 1:
            here[slot] = _value(keys, text)
        elif (here[slot] if isinstance(here, list) else here.get(slot)) is None:
            here[slot] = _empty(keys[: depth + 1])
        here = here[slot]
    return None


def _value(keys: list[str], text: str) -> Any:
    field = _field(tuple(keys))
    if field and (field.annotation is str or str in get_args(field.annotation)):
        optional = type(None) in get_args(field.annotation)
        return None if optional and text in ("null", "~", "") else text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, *_YAML_LEAKS):
        return text  # the check against Config says what it should have been


def _empty(keys: list[str]) -> Any:
    """What an override starts from when the file has nothing there: no keys, or the default list."""
    field = _field(tuple(keys))
    if field and get_origin(field.annotation) is tuple and not keys[-1].isdecimal():
        return [item.model_dump() if isinstance(item, BaseModel) else item for item in field.default]
    return {}


def _problem(details: ErrorDetails) -> str | None:
    """One line: the path, the value, what it must be, what the key is."""
    kind, path, value = details["type"], details["loc"], details["input"]
    if kind == "extra_forbidden":
        while isinstance(value, dict) and len(value) == 1:
            path, value = (*path, *value), next(iter(value.values()))
        return f"{_dotted(path)} = {_show(value)}: unknown key; {_suggest(path)}"
    if kind == "too_short" and len(value) >= details["ctx"]["min_length"]:
        return None  # pydantic's echo of an item that was wrong
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
    section, leaves = path[:-1], list(_leaves(Config))
    near = [_dotted((*section, name)) for name in difflib.get_close_matches(str(path[-1]), _names(section), n=1)]
    near = near or difflib.get_close_matches(_dotted(path), leaves, n=1, cutoff=0.75)
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == str(path[-1])]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return _keys(section) if _names(section) else _keys(())


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


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
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


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


def _show(value: Any) -> str:
    """A value as a user would write it, on one line and short."""
    if isinstance(value, str) and value and value.isprintable() and len(value) <= 80:
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # an integer of more digits than Python likes to print
        return f"a very large {type(value).__name__}"
