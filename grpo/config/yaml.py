"""One mapping out of a YAML file, or a ConfigError that names the line. Scalars are read by YAML 1.2's core schema.

PyYAML parses; what it would make of the values (YAML 1.1: `012` is ten, `1:30` is ninety, `1e-6` is text, `no` is
false) is not used. Nothing but null, true, false, numbers, text, lists and mappings can come out.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from grpo.errors import ConfigError
from grpo.store.files import open_regular

MOST_CHARACTERS = 256 * 1024
"""A longer file is no configuration; PyYAML would need minutes for some."""
MOST_NODES = 200_000
"""Values, counted as often as aliases (*name) repeat them: a few lines of aliases of aliases mean gigabytes."""
MOST_DIGITS = 4300
"""Of a whole number, in whatever base: Python prints no longer ones."""
MOST_NESTED = 40
"""Lists and mappings inside each other, counted: PyYAML calls itself for each, and must never come to Python's end."""

Scalar = tuple[re.Pattern[str], list[str], Callable[[str], object]]
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS * 3 / 4 and text[:2] in ("0o", "0x"):
        raise ValueError("more digits than Python prints")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


SCALARS: dict[str, Scalar] = {
    "null": (_NULL, ["~", "n", "N", ""], lambda text: None),
    "bool": (_BOOL, list("tTfF"), lambda text: text.lower() == "true"),
    "int": (_INTEGER, list("-+0123456789"), _whole),
    "float": (_FLOAT, list("-+.0123456789"), lambda text: float(re.sub(r"\.(?=[iInN])", "", text))),
}
"""By kind: how it is written, with what it can begin, what it is. The first that fits counts; all else is text."""


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class Loader(yaml.BaseLoader):
    """PyYAML's loader that knows no types, with those of the core schema; equal keys and merge keys are refused."""

    nested = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, tuple[int, int]] = {}  # of each node: values in it, levels

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node and all in it."""
        self.nested += 1
        if self.nested > MOST_NESTED:
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_NESTED} levels inside each other", problem_mark=mark)
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.nested -= 1
        if node is not None and not alias:
            self.sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        """With aliases written out. An alias of what it is in itself is the one child that has no size yet."""
        below = [] if isinstance(node, yaml.ScalarNode) else list(node.value)
        below = [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
        sizes = [self.sizes.get(id(child), (MOST_NODES, 0)) for child in below]
        count, levels = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if count > MOST_NODES or levels > MOST_NESTED:
            raise _refused("aliases (*) that repeat too much, or themselves; write the values out", node)
        return count, levels

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """PyYAML itself would keep the last of two equal keys.

        Merge keys of merge keys grow without bound, and a closed configuration has no place for their anchors.
        """
        lines: dict[object, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key must be text, not a list or a mapping", key)
            if key.value == "<<" and not key.style:
                raise _refused("merge keys (<<) are not read; write the keys out", key)
            name = self.construct_object(key)
            if name in lines:
                problem = f"the key {key.value[:80]!r} is there twice, first in line {lines[name]}; keep one of them"
                raise _refused(problem, key)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_core(self, node: yaml.ScalarNode) -> object:
        """Null, a bool or a number, also where a tag says so: `!!int x` gets here too."""
        kind = node.tag.removeprefix(_TAG)
        pattern, _, value = SCALARS[kind]
        text = self.construct_scalar(node)
        try:
            if pattern.match(text):
                return value(text)
        except ValueError:  # more digits than Python converts
            pass
        raise _refused(f"the value {text[:40]!r} cannot be read as {kind}", node)

    def construct_unknown(self, node: yaml.Node) -> object:
        """A tag of YAML 1.1 (a date, a set, bytes) or of somebody's own."""
        raise _refused(f"the tag {node.tag[:80]!r} is not read; write a plain value", node)


class Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would take for something else: its files mean the same to any reader."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """In quotes with escapes where PyYAML would write a line end of YAML 1.1 that it then reads as a space."""
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style)


for _kind, (_pattern, _first, _) in SCALARS.items():
    Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)
Dumper.add_representer(str, Dumper.represent_str)
Loader.yaml_constructors = {
    **dict.fromkeys((_TAG + kind for kind in SCALARS), Loader.construct_core),
    _TAG + "str": Loader.construct_scalar,
    _TAG + "seq": Loader.construct_sequence,
    _TAG + "map": Loader.construct_mapping,
    None: Loader.construct_unknown,
}


def parse(text: str) -> object:
    """What a YAML text holds. Raises yaml.YAMLError, which has a line where it is a MarkedYAMLError; nothing else."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # PyYAML's scanner, of an escape such as "\\UFFFFFFFF"
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from None


def dump(tree: object) -> str:
    """YAML that `parse` reads back, with keys in their order."""
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def read(path: str | Path) -> dict[object, object]:
    """The mapping that the file holds. Raises ConfigError that names the file, and the line where there is one."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path") from None
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{path}: longer than {MOST_CHARACTERS} characters; is it the run's YAML file?")
    try:
        tree = parse(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not usable as YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not usable as YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        raise ConfigError(f"{path}: empty; the least it needs is `model: {{path: FOLDER}}`")
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ConfigError(f"{path}: must be a mapping of sections (`model:` and so on), but it is a {kind}")
    return tree
