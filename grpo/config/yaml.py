"""One mapping out of a YAML file, or a ConfigError that names the line."""

from pathlib import Path
from typing import Any

import yaml

from grpo.errors import ConfigError

MOST_CHARACTERS = 256 * 1024
"""A longer file is no configuration; PyYAML would need minutes for some."""

# PyYAML's constructors let these escape on values such as `!!int ""`; RecursionError comes from deep nesting.
LEAKS = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its dates, and without its habit of keeping the last of two equal keys."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys of merge keys grow without bound, and a closed configuration has no place for their anchors."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are not read; write the keys out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)

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


def read(path: str | Path) -> dict[Any, Any]:
    """The mapping that the file holds. Raises ConfigError that names the file, and the line where there is one."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path") from None
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{path}: longer than {MOST_CHARACTERS} characters; is it the run's YAML file?")
    try:
        tree = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not usable as YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, *LEAKS) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not usable as YAML: {reason}") from None
    if tree is None:
        raise ConfigError(f"{path}: empty; the least it needs is `model: {{path: FOLDER}}`")
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ConfigError(f"{path}: must be a mapping of sections (`model:` and so on), but it is a {kind}")
    return tree
