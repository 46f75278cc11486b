"""A configuration is accepted as it was meant, or refused with every problem named; never a traceback."""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.config.load import _field, config_schema, dump_config, load_config
from grpo.config.renamed import RENAMED
from grpo.errors import ConfigError

MINIMAL = "model: {path: ./x}\ndata: {source: arithmetic}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("spelling", ["1e-6", "1e-06", "1.0e-6", "0.000001", "1E-6"])
def test_a_learning_rate_is_a_number_however_it_is_spelled(tmp_path: Path, spelling: str) -> None:
    assert load_config(write(tmp_path, MINIMAL + f"train: {{learning_rate: {spelling}}}")).train.learning_rate == 1e-6
    assert load_config(write(tmp_path, MINIMAL), [f"train.learning_rate={spelling}"]).train.learning_rate == 1e-6


def test_overrides_win_over_the_file_and_keep_the_rest(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        MINIMAL + "train: {epochs: 2, ranks: 4}\nrewards:\n- function: boxed\n- {function: gsm8k, weight: 3}\n",
    )
    config = load_config(path, ["train.epochs=3", "rewards.1.weight=0.5", "train.betas=[0.8, 0.9]", "eval.source=null"])
    assert (config.train.epochs, config.train.ranks) == (3, 4)
    assert [(reward.function, reward.weight) for reward in config.rewards] == [("boxed", 1.0), ("gsm8k", 0.5)]
    assert config.train.betas == (0.8, 0.9)
    assert config.eval.source is None


def test_overrides_start_from_the_default_list_and_may_add_one_item(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path, ["rewards.0.weight=2"]).rewards[0].function == "gsm8k"
    assert [r.function for r in load_config(path, ["rewards.1.function=m:f"]).rewards] == ["gsm8k", "m:f"]
    assert load_config(path, ["train.betas.0=0.5"]).train.betas == (0.5, 0.95)


@pytest.mark.parametrize("text", ["5", "no", "{question}", "a: b", "[x", "1e-6", "2024-01-01", "'quoted'"])
def test_the_value_of_a_text_key_is_the_text_itself(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, MINIMAL), [f"data.system_prompt={text}"]).data.system_prompt == text


def test_a_date_is_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "eval: {split: 2024-01-01}")).eval.split == "2024-01-01"


def test_a_section_without_keys_means_the_defaults(tmp_path: Path) -> None:
    assert (
        load_config(write(tmp_path, MINIMAL + "train:\n#  epochs: 3\n")).train == Config.model_fields["train"].default
    )


def test_a_mistyped_key_names_the_path_the_value_and_the_nearest_key(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "train.learning_rat=1e-6") == [
        "train.learning_rat = 1e-06: unknown key; did you mean train.learning_rate?"
    ]
    assert problems(tmp_path, MINIMAL + "learning_rate: 1e-6") == [
        "learning_rate = 1e-06: unknown key; did you mean train.learning_rate or sft.learning_rate?"
    ]
    assert problems(tmp_path, MINIMAL, "trian.epochs=2") == [
        "trian.epochs = 2: unknown key; did you mean train.epochs?"
    ]
    assert problems(tmp_path, MINIMAL, "trian.ranks=2") == ["trian.ranks = 2: unknown key; did you mean train.ranks?"]
    assert problems(tmp_path, MINIMAL + "rewards: [{function: m:f, wait: 2}]") == [
        "rewards.0.wait = 2: unknown key; did you mean rewards.0.weight?"
    ]
    assert problems(tmp_path, MINIMAL, "model.xyz=1") == [
        "model.xyz = 1: unknown key; model has the keys path, revision, dtype, max_length, fp32_head"
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.steps=0", "run.steps = 0: must be greater than or equal to 1"),
        ("run.steps=many", "run.steps = many: must be a valid integer"),
        ("run.steps=true", "run.steps = true: must not be true or false"),
        ("model.dtype=fp8", "model.dtype = fp8: must be 'float32' or 'bfloat16'"),
        ("train.learning_rate=.nan", "train.learning_rate = nan: must be a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate = inf: must be a finite number"),
        ("train.zero_stage=4", "train.zero_stage = 4: must be 0, 1, 2 or 3"),
        ("train.betas=[0.9]", "train.betas.1: missing"),
        ("train.betas=1", "train.betas = 1: must be a list"),
        ("metrics.port=70000", "metrics.port = 70000: must be less than or equal to 65535"),
        ("train=1", "train = 1: must be a section of keys; train has the keys ranks,"),
        ("rewards=[]", "rewards = []: must have at least 1 item"),
        ("rewards.3.weight=1", "rewards.3.weight=1: rewards has 1 items, numbered from 0; 3 is not one"),
        ("run.name.x=1", "run.name.x=1: run.name is a in the file and has no keys"),
        ("train.epochs", "train.epochs: an override must read key=value"),
        ("=3", "=3: an override must read key=value"),
        ("train..epochs=3", "train..epochs=3: an override must read key=value"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(tmp_path: Path, override: str, problem: str) -> None:
    lines = problems(tmp_path, MINIMAL + "run: {name: a}", override)
    assert len(lines) == 1 and lines[0].startswith(problem), lines


def test_a_key_that_was_renamed_or_is_gone_says_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "it is gone: every sync is verified"
    table = {"train.lr": "train.learning_rate", "rewards.scale": "rewards.weight", "sync.verify": gone}
    for old, new in table.items():
        monkeypatch.setitem(RENAMED, old, new)
    text = "train: {lr: 1e-6}\nsync: {verify: true}\nrewards: [{function: boxed, scale: 2}]"
    lines = problems(tmp_path, MINIMAL + text)
    assert sorted(lines) == [
        "rewards.0.scale = 2: unknown key; it is now called rewards.weight",
        f"sync.verify = true: unknown key; {gone}",
        "train.lr = 1e-06: unknown key; it is now called train.learning_rate",
    ]


def test_a_renamed_key_does_not_exist_and_its_new_name_does() -> None:
    for old, new in RENAMED.items():
        assert _field(tuple(old.split("."))) is None, old
        assert " " in new or _field(tuple(new.split("."))) is not None, new


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = "model: {dtype: fp8}\nrun: {name: 5, steps: x}\nrewards: [{fun: x}]\nepochs: 3\n"
    lines = problems(tmp_path, text, "oops", "train.ranks=0")
    paths = ["oops", "run.name", "run.steps", "model.path", "model.dtype", "rewards.0.fun", "train.ranks", "epochs"]
    assert sorted(line.split(":")[0].split(" =")[0] for line in lines) == sorted(paths)


def test_combinations_are_checked(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, MINIMAL, "rollout.max_tokens=4096")
    assert line.startswith("a prompt needs room before its completion: rollout.max_tokens = 4096 must be below")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty; the least it needs"),
        ("# nothing\n", "empty; the least it needs"),
        ("- a\n", "must be a mapping"),
        ("train", "must be a mapping"),
        ("model: {path: x}\ntrain: [", ":2: not usable as YAML"),
        ("model: {path: x}\n\ttrain: 1", ":2: not usable as YAML"),
        ("model:\n  path: x\n  path: y\n", ":3: not usable as YAML: the key 'path' is there twice, first in line 2"),
        ("model: {path: x}\n---\nmodel: {path: y}\n", ":2: not usable as YAML"),
        ("model: {path: !!python/name:os.system }", ":1: not usable as YAML"),
        ('model: {path: !!int ""}', "not usable as YAML"),
        ("[" * 5000, "not usable as YAML"),
        ("model: {path: \x07}", "not usable as YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(str(tmp_path / "run.yaml")) and problem in line


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: {path: Gr\u00fc\u00dfe}".encode("latin-1"))
    expected = {
        "latin.yaml": "not UTF-8",
        "missing.yaml": "No such file",
        ".": "must be a regular file, but is a folder",
        "a\0b": "cannot be read",
    }
    for name, problem in expected.items():
        with pytest.raises(ConfigError, match=problem):
            load_config(os.path.join(tmp_path, name))


def test_the_schema_is_closed_and_documents_every_key() -> None:
    definitions = json.loads(json.dumps(config_schema()))["$defs"]
    assert definitions.pop("JsonValue") == {}, "any value that JSON can say"
    for name, definition in definitions.items():
        assert definition["additionalProperties"] is False, name
        undocumented = [key for key, leaf in definition["properties"].items() if not leaf.get("description")]
        assert undocumented == [], name


def random_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
    )


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix] + [path for key, value in items for path in paths(value, (*prefix, key))]


WHOLE = Config.model_validate({"model": {"path": "./x"}, "data": {"source": "arithmetic"}}).model_dump(mode="json")


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_gives_a_config_or_a_config_error(data: st.DataObject) -> None:
    tree = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([path for path in paths(tree) if path]))
        node = tree
        for key in parents:
            node = node[key]
        action = data.draw(st.sampled_from(["replace", "delete", "rename"]))
        value = node.pop(last)
        if action != "delete":
            new = data.draw(st.text(max_size=6)) if action == "rename" else last
            value = data.draw(random_values()) if action == "replace" else value
            node.insert(min(last, len(node)), value) if isinstance(node, list) else node.update({new: value})
    check(yaml.safe_dump(tree, allow_unicode=True), [])


@settings(max_examples=300)
@given(st.text(alphabet=st.sampled_from("model: {path}[x]\n-#&*!|>'\"%@`?,1e.~<\t\0"), max_size=60))
def test_any_text_gives_a_config_or_a_config_error(text: str) -> None:
    check(text, [])


KEYS = st.sampled_from(
    [".".join(map(str, path)) for path in paths(WHOLE)] + ["rewards.1", "x", "a.b", "train.0", "9", ""]
)


@settings(max_examples=300)
@given(st.lists(st.tuples(KEYS, st.text(max_size=8)), max_size=4))
def test_any_overrides_give_a_config_or_a_config_error(pairs: list[tuple[str, str]]) -> None:
    check(MINIMAL, [f"{key}={value}" for key, value in pairs])


def check(text: str, overrides: list[str]) -> None:
    """Loads; an accepted configuration must survive being written down."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert str(error).strip()
            return
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
