"""Configurations that are large, deep or strange on purpose: one short refusal, and not after seconds."""

from pathlib import Path

import pytest

from grpo.config import load as module
from grpo.config.diff import MOST_CHANGES, check_config_diff
from grpo.config.load import MOST_PROBLEMS, load_config
from grpo.errors import ConfigError
from tests.runs import make_config

MODEL = "model: {path: /tmp}\ndata: {source: arithmetic}\n"


def refused(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    (tmp_path / "run.yaml").write_text(MODEL + text, errors="surrogatepass")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) <= MOST_PROBLEMS + 1 and len(str(caught.value)) < 10_000
    return lines


MANY = {
    "keys": "".join(f"k{i}: 1\n" for i in range(22_000)),
    "keys of a section": "train:\n" + "".join(f"  k{i}: 1\n" for i in range(18_000)),
    "keys that may drift": f"run: {{allow_drift: [{', '.join(f'train.x{i}' for i in range(14_000))}]}}\n",
    "items of another kind": f"run: {{allow_drift: [{', '.join('1' for _ in range(22_000))}]}}\n",
}


@pytest.mark.parametrize("kind", MANY)
def test_only_what_is_shown_is_searched_for_what_was_meant(tmp_path, monkeypatch, kind):
    searched = []
    suggest = module._suggest
    monkeypatch.setattr(module, "_suggest", lambda path: searched.append(path) or suggest(path))
    lines = refused(tmp_path, MANY[kind])
    assert lines[-1].startswith("and ") and lines[-1].endswith(" more problems")
    assert len(searched) <= MOST_PROBLEMS
    if kind == "keys":
        assert lines[-1] == f"and {22_000 - MOST_PROBLEMS} more problems"
    if kind == "keys that may drift":
        assert lines[-1] == f"and {14_000 - MOST_PROBLEMS} more problems"


def test_many_overrides(tmp_path):
    lines = refused(tmp_path, "", *(f"train.x{i}=1" for i in range(500)))
    assert lines[-1] == f"and {500 - MOST_PROBLEMS} more problems"


def test_a_long_list_of_changed_keys_is_cut():
    before = make_config().model_dump(mode="json") | {"older": {f"k{i}": "x" * 1000 for i in range(14_000)}}
    with pytest.raises(ConfigError) as caught:
        check_config_diff(before, make_config())
    lines = str(caught.value).splitlines()
    assert len(lines) == MOST_CHANGES + 3 and max(map(len, lines)) < 500
    assert lines[-2:] == [f"  and {14_000 - MOST_CHANGES} more", "set them back, or choose another run.dir"]


DIGITS = "9" * 5000
STRANGE = {
    f"rewards.{DIGITS}=1": "rewards has 1 items, numbered from 0",
    f"rewards.{DIGITS}.weight=1": "rewards has 1 items, numbered from 0",
    "rewards.\u0663=1": "numbered from 0",
    "rewards.\u00b2=1": "numbered from 0",
    "rewards.-1.weight=1": "numbered from 0",
    "a" + ".b" * 100_000 + "=1": "a key has at most 40 parts",
    f"run.seed={DIGITS}": "run.seed = ",
    f"run.seed=0o{'7' * 5000}": "run.seed = ",
    "run.steps=1:30": "run.steps = 1:30: must be a valid integer",
    "deadlines.sync=1:30:00.5": "deadlines.sync = 1:30:00.5: must be a valid number",
    "run.steps=1e999": "run.steps = inf: must be a finite number",
    "run.steps=" + "[" * 5000: "run.steps = ",
    "run.name=\udcff": "must be whole Unicode text",
    "\udcff=1": "half a surrogate pair",
    "model.\udcff=1": "half a surrogate pair",
}


@pytest.mark.parametrize("override", STRANGE, ids=lambda override: ascii(override[:24]))
def test_a_strange_override_is_refused_in_a_line(tmp_path, override):
    assert any(STRANGE[override] in line for line in refused(tmp_path, "", override))


def chain(first: str, count: int, link: str) -> str:
    """Anchors that each name the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {link.replace('@', f'*a{n - 1}')}" for n in range(1, count)]
    return "\n".join(lines) + "\n"


ALIASES = {
    "a list of lists": chain("[x]", 9, "[@, @, @, @, @, @, @, @, @, @]") + "rewards: *a8\n",
    "a mapping of mappings": chain("{x: 1}", 40, "{x: @, y: @}") + "run: *a39\n",
    "a long chain": chain("[x]", 9000, "[@]") + "run: {name: *a8999}\n",
    "itself": "train: &a {x: *a}\n",
    "itself in a list": "rewards: &a [*a]\n",
    "itself, deep": "foo: &a {x: {y: [1, *a]}}\n",
}


@pytest.mark.parametrize("kind", ALIASES)
def test_aliases_that_mean_more_than_they_say_are_refused(tmp_path, kind):
    [line] = refused(tmp_path, ALIASES[kind])
    assert "aliases (*) that repeat too much, or themselves" in line


def test_a_plain_alias_is_read(tmp_path):
    text = "model: {path: /tmp}\nrun: {name: &n x1}\ndata: {source: arithmetic, split: *n}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml").data.split == "x1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {steps: 0x" + "f" * 5000 + "}", "cannot be read as int"),
        ("foo: 0x" + "f" * 200_000, "cannot be read as int"),
        ("foo: " + DIGITS, "cannot be read as int"),
        ("run: {steps: .nan}", "must be a finite number"),
        ("1: 2\n1.5: 2\nnull: 3", "a key must be text"),
        ("run: {}\nrun: {}", "there twice"),
        ("run: {<<: {steps: 1}}", "merge keys"),
        ("? [a]\n: 1", "a key must be text"),
        ('"\\ud800": 1', "half a surrogate pair"),
        ('run: {"\\ud800": 1}', "half a surrogate pair"),
        ('run: {dir: "a\\0b"}', "one line of printable text"),
    ],
)
def test_a_strange_file_is_refused_in_a_line(tmp_path, text, said):
    assert any(said in line for line in refused(tmp_path, text))
