"""YAML 1.2's core schema and nothing else: each scalar, each refusal with its line, and what is written reads back."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.yaml import MOST_CHARACTERS, MOST_NESTED, dump, parse

SCALARS: list[tuple[str, Any]] = [
    ("1e-6", 1e-6),
    ("1E6", 1e6),
    ("1.", 1.0),
    (".5", 0.5),
    ("-.inf", -math.inf),
    (".INF", math.inf),
    ("012", 12),
    ("+1", 1),
    ("0o17", 15),
    ("0x1F", 31),
    ("True", True),
    ("FALSE", False),
    ("~", None),
    ("", None),
    ("null", None),
    # What YAML 1.1 would take for a number, a bool or a date is text.
    *((text, text) for text in ("1_000", "0b11", "1:30", "1:2:3.5", "yes", "No", "on", "OFF", "y", "2024-01-01", "=")),
    *((text, text) for text in ("tRUE", "nULL", "1e", "e1", ".", "+", "0o8", "0x", "-0x1", "+.nan", "١٢", "1٢")),
    ("'1'", "1"),
    ("!!str 1", "1"),
    ("!!int 0x1F", 31),
    ("!!float 1", 1.0),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    read = parse(f"a: {text}")["a"]
    assert (read, type(read)) == (value, type(value))


def test_not_a_number() -> None:
    assert math.isnan(parse(".nan"))


REFUSED = {
    "twice": ("x: 0\na: 1\n'a': 2", 3, "the key 'a' is there twice, first in line 2; keep one of them"),
    "twice as numbers": ("1: 0\n0x1: 0", 2, "the key '0x1' is there twice, first in line 1"),
    "merge": ("a: &a {x: 1}\nb:\n  <<: *a", 3, "merge keys (<<) are not read; write the keys out"),
    "list as key": ("x: 0\n? [a, b]\n: 1", 2, "a key must be text"),
    "itself": ("a:\n- &b\n  - *b", 2, "themselves"),
    "empty int": ('a: 0\nb: !!int ""', 2, "the value '' cannot be read as int"),
    "sexagesimal": ("a: !!float 1:30", 1, "cannot be read as float"),
    "digits": (f"a: 1\nb: {'9' * 5000}", 2, "cannot be read as int"),
    "bool": ("\na: !!bool maybe", 2, "cannot be read as bool"),
    "int of a list": ("\na: !!int [1]", 2, "expected a scalar node"),
    "mapping of a scalar": ("\na: !!map x", 2, "expected a mapping node"),
    **{
        kind: (f"a: 0\nb: !!{kind} x", 2, f"the tag 'tag:yaml.org,2002:{kind}' is not read; write a plain value")
        for kind in ("timestamp", "binary", "set", "omap", "pairs", "python/name:os.system")
    },
    "own tag": ("a: !thing x", 1, "the tag '!thing' is not read"),
    "escape": ('a: 0\nb: "\\UFFFFFFFF"', 2, ""),
    "surrogate escape": ('a: 0\nb: "\\U00110000"', 2, ""),
    "version": (f"%YAML {'1' * 5000}.1\n---\na: 1", 1, "digits"),
    "lists": ("\n" + "[" * 20_000, 2, f"more than {MOST_NESTED} levels inside each other"),
    "mappings": ("a: {" * 20_000, 1, f"more than {MOST_NESTED} levels"),
    "lines": ("".join(" " * depth + "a:\n" for depth in range(700)), MOST_NESTED, f"more than {MOST_NESTED} levels"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_line(name: str) -> None:
    text, line, says = REFUSED[name]
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        parse(text)
    assert caught.value.problem_mark is not None and caught.value.problem_mark.line + 1 == line
    assert says in str(caught.value.problem)


def test_as_deep_as_may_be() -> None:
    deepest = "[" * (MOST_NESTED - 1) + "1" + "]" * (MOST_NESTED - 1)
    assert str(parse(deepest)) == deepest
    with pytest.raises(yaml.MarkedYAMLError, match="levels"):
        parse(f"[{deepest}]")
    assert parse(f"[{', '.join(['[[1]]'] * MOST_NESTED)}]") == [[[1]]] * MOST_NESTED


def test_aliases_are_the_same_value_and_bounded_as_if_written_out() -> None:
    def laughs(count: int) -> str:
        return "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, count))

    read = parse(laughs(12))
    assert read["a11"][0] is read["a10"]
    with pytest.raises(yaml.MarkedYAMLError, match="repeat too much"):
        parse(laughs(1000))


def test_depth_is_bounded_whatever_the_size() -> None:
    with pytest.raises(yaml.MarkedYAMLError, match="levels"):
        parse("[" * MOST_CHARACTERS)


TEXTS = st.text() | st.sampled_from([text for text, _ in SCALARS] + ["<<", "#", "-", "a: b", "2024-01-01 00:00:00"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS.filter("<<".__ne__), inner)))
def test_what_is_written_means_the_same_to_readers_of_both_versions(tree: Any) -> None:
    text = dump({"a": tree})
    assert parse(text) == {"a": tree}
    assert yaml.safe_load(text) == {"a": tree}
