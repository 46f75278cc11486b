"""Every key of the configuration with every kind of wrong value: a clear block of text, at once, no traceback."""

import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config import Config
from grpo.config.load import MOST_PROBLEMS, load_config
from grpo.config.yaml import MOST_CHARACTERS
from grpo.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOOD = {"model": {"path": "./model"}, "data": {"source": "arithmetic"}}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        item = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if isinstance(item, type) and issubclass(item, BaseModel):
            yield from leaves(item, f"{prefix}{name}." + ("0." if item is not kind else ""))
        else:
            yield f"{prefix}{name}", field


LEAVES = dict(leaves(Config))
SECTIONS = [name for name, field in Config.model_fields.items() if isinstance(field.annotation, type)]
LISTS, OBJECTS = ([[1]], [["x", None]]), ({"a": 1}, {"path": {"path": {}}})
NUMBERS = (math.nan, math.inf, -math.inf, 1e300, -1e300, 10**30, -(10**30), 10**400)
ASSORTED = (*LISTS[0], *OBJECTS)


def wrong_values(field: FieldInfo) -> list[Any]:
    """What this key can never hold, whatever its bounds: by its kind alone."""
    kind, optional = field.annotation, False
    if get_origin(kind) in (Union, types.UnionType):
        optional = type(None) in get_args(kind)
        kind = [one for one in get_args(kind) if one is not type(None)][-1]  # behind "auto"
    wrong: list[Any] = [*ASSORTED] if optional else [*ASSORTED, None]
    if get_origin(kind) is Literal:
        return [*wrong, "nonsense", 17, True, "", *NUMBERS]
    if get_origin(kind) is tuple:
        return [{"a": 1}, *([] if optional else [None]), 5, "text", True, [None], [[1]], [{"a": 1}], [math.nan]]
    if get_origin(kind) is dict:
        return [None, 5, "text", True, [1], {"a b": 1}, {"": 1}, {"a": math.nan}]
    base = next(one for one in (kind, *get_args(kind)) if isinstance(one, type))
    if base is bool:
        return [*wrong, "maybe", 5, 1.5, "", *NUMBERS]
    if base is str:
        return [*wrong, 5, 1.5, True, "half \ud800"]
    return [*wrong, "many", "", "1,5", "0x", True, *([1.5] if base is int else []), *NUMBERS]


def put(tree: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with a value at `rewards.0.weight`."""
    keys = dotted.split(".")
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(tree))
    here: Any = copy
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        if not following:
            here[int(key) if key.isdecimal() else key] = value
        elif isinstance(here, list):
            here = here[int(key)]
        else:
            here = here.setdefault(key, [{}] if following.isdecimal() else {})
    return copy


def refusal(text: str, *overrides: str) -> str | None:
    """The message of the ConfigError; None if it loads. Whatever else comes out is a failure of the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_config(path, overrides)
        except ConfigError as error:
            return well_formed(str(error))
    return None


def well_formed(message: str) -> str:
    lines = message.split("\n")
    assert 0 < len(lines) <= MOST_PROBLEMS + 1, message[:2000]
    for line in lines:
        assert line.isprintable() and 10 < len(line) < 700, ascii(line[:1500])
    return message


def judge(dotted: str, value: Any, field: FieldInfo) -> str:
    """What is wrong with the answer to this value, "" if nothing is."""
    message = refusal(yaml.safe_dump(put(GOOD, dotted, value), allow_unicode=True))
    if message is None:
        return f"{dotted} = {value!r} was accepted"
    line = next((line for line in message.split("\n") if line.startswith(dotted)), "")
    if not re.search(r"must (be|have|not)|unknown key|missing|cannot be", line):
        return f"{dotted} = {value!r}: {message}"
    options = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if options and "quotes if it is text" not in line:
        return "" if all(str(option) in line for option in options) else f"{dotted}: options are not named: {line}"
    return ""


@pytest.mark.parametrize("dotted", LEAVES)
def test_every_wrong_value_of_a_key_is_refused_by_name(dotted: str) -> None:
    field = LEAVES[dotted]
    assert [problem for value in wrong_values(field) if (problem := judge(dotted, value, field))] == []


@pytest.mark.parametrize("dotted", LEAVES)
def test_a_misspelt_key_is_answered_with_the_right_one(dotted: str) -> None:
    section, _, name = dotted.rpartition(".")
    for wrong in (name[:-1] if len(name) > 3 else name + name[-1], name + "s", name.replace("_", "-") + "x"):
        if f"{section}.{wrong}" == "data.sources":
            continue  # a key of its own
        message = refusal(yaml.safe_dump(put(GOOD, f"{section}.{wrong}", 1)))
        assert message and f"{section}.{wrong} = 1: unknown key; " in message
        nearest = "top_p" if wrong == "top_" else name  # as near to top_k
        assert nearest in message.partition("unknown key")[2], message


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_a_mapping(section: str) -> None:
    for value in (5, "text", [1], True, [{"a": 1}]):
        message = refusal(yaml.safe_dump(GOOD | {section: value}))
        assert message and message.startswith(f"{section} = ") and "must be a section of keys" in message
        assert f"{section} has the keys " in message


def test_there_are_enough_mutations() -> None:
    count = sum(len(wrong_values(field)) + 3 for field in LEAVES.values()) + 5 * len(SECTIONS)
    print(f"\n{count} mutated configurations of {len(LEAVES)} keys")
    assert len(LEAVES) > 80 and count > 900


BOUNDS = {
    "run.seed": (0, 2**32 - 1),  # numpy, which vLLM seeds, takes no more
    "rollout.samples_per_prompt": (2, 2**20),
    "model.max_length": (8, 10_000_000),
    "rollout.temperature": (0.01, 100),
    "train.learning_rate": (0, 1),
    "metrics.port": (0, 65535),
    "deadlines.sync": (0, 10_000_000),
    "rollout.memory_utilization": (0, 1),
    "reward_code.max_failures": (0, 1),
}


@pytest.mark.parametrize("dotted", BOUNDS)
def test_a_number_out_of_range_is_told_the_range(dotted: str) -> None:
    for bound, value in zip(BOUNDS[dotted], (BOUNDS[dotted][0] - 1, BOUNDS[dotted][1] + 1), strict=True):
        message = refusal(yaml.safe_dump(put(GOOD, dotted, value))) or ""
        told = [float(number) for number in re.findall(r"than (?:or equal to )?([\d.e+-]+)", message)]
        assert told == [bound], message


COMBINATIONS = {
    "rollout.prompts_per_step=1 rollout.samples_per_prompt=2 train.minibatches=3": "minibatches x train.ranks = 3",
    "rollout.prompts_per_step=2 train.ranks=17 rollout.samples_per_prompt=8": "train.minibatches x train.ranks = 17",
    "rollout.prompts_per_step=1048576": "must be at most 1048576",
    "rollout.samples_per_prompt=1048576": "must be at most 1048576",
    "rollout.max_tokens=2048": "rollout.max_tokens = 2048 must be below model.max_length = 2048",
    "rollout.samples_per_prompt=1": "as a completion is compared with the others of its prompt: one alone has the adv",
    "rollout.samples_per_prompt=0": "samples_per_prompt = 0: must be greater than or equal to 2",
    "rollout.samples_per_prompt=true": "samples_per_prompt = true: must not be true or false",
    "model.max_length=512": "rollout.max_tokens = 512 must be below model.max_length = 512",
    "model.max_length=10000 train.tokens_per_micro_batch=8192": "batch = 8192 is below model.max_length = 10000",
    "train.tokens_per_micro_batch=100": "train.tokens_per_micro_batch = 100 is below",
    "rollout.top_p=0.7": "must mean the same distribution: with rollout.top_p = 0.7 the sampler renormalises",
    "rollout.top_p=0.999": "use rollout.top_p: 1, and rollout.temperature",
    "train.warmup_steps=101": "train.warmup_steps = 101 is above run.steps = 100; lower train.warmup_steps",
    "run.steps=2 train.warmup_steps=5": "train.warmup_steps = 5 is above run.steps = 2",
    "sync.every=3": "checkpoint.every = 10 must be a multiple of sync.every = 3",
    "checkpoint.every=7 sync.every=2": "checkpoint.every = 7 must be a multiple of sync.every = 2",
    "rollout.gpus_per_engine=1.5": "must be a whole number of GPUs or a share of one",
    "rollout.engines=0": "must be a whole number from 1 to 10000, or {min, max}",
    "rollout.engines.min=2": "rollout.engines.max: missing",
    "rollout.engines.max=0": "rollout.engines.max = 0: must be greater than or equal to 1",
    "rollout.engines.min=3 rollout.engines.max=2": "min = 3 must be at most max = 2; lower min or raise max",
    "rollout.engines.mx=3 rollout.engines.max=3": "unknown key; did you mean rollout.engines.max?",
    "rollout.engines.max=3 rollout.engines_per_gpu=2": "must be multiples of rollout.engines_per_gpu = 2",
    "rollout.engines.max=3 rollout.gpus_per_engine=0.5": "engines that come and go share no GPU with a rank",
    "rollout.engines.max=4 rollout.engines.min=2 rollout.engines_per_gpu=2 train.gpus_per_rank=0.5": "rank = 0.5; rem",
    "rollout.engines_per_gpu=2 rollout.tensor_parallel=2": "engines_per_gpu = 2, but rollout.tensor_parallel = 2",
    "rollout.engines_per_gpu=2 rollout.gpus_per_engine=0.5": "but rollout.gpus_per_engine = 0.5; remove one of them",
    "train.gpus_per_rank=0.001": "must be greater than or equal to 0.01",
    "eval.temperature=0.001": "must be 0 (greedy) or at least 0.01",
    "train.betas=[0.9, 1.0]": "train.betas.1 = 1.0: must be less than 1",
    "train.betas=[0.9, 0.9, 0.9]": "must have at most 2 items",
    "data.prompt_format=x": "the prompt needs the question; write {question}",
    "rewards.0.function=a:b:c": "such as 'gsm8k', or 'module:function'",
    "rewards.0.function=os.system()": "such as 'gsm8k', or 'module:function'",
    "run.allow_drift=[train.learning_rat]": "unknown key; did you mean train.learning_rate?",
    "reward_code.environment=[A=B]": "must be the name of an environment variable",
    "cluster.role_label=a/b/c": "must be a label's key",
    "model.revision=main": "must be a commit: 40 hex digits",
    "data.revision=E53F048": "must be a commit: 40 hex digits",
    "train.offload_param=cpu": "train.offload_param is cpu, but train.zero_stage = 1; use zero_stage: 3, or",
    "train.offload_optimizer=nvme": "train.offload_optimizer = nvme: must be 'none' or 'cpu'",
    "train.offload_optimizer=cpu": "train.zero_stage = 1; use zero_stage: 2, also for one rank",
    "train.offload_param=cpu train.zero_stage=3": "train.offload_optimizer = none; set it to cpu, too",
    "train.offload_optimizer=cpu train.zero_stage=0": "train.zero_stage = 0; use zero_stage: 2, also for one rank",
    "train.offload_optimizer=cpu train.zero_stage=2 train.lora={}": "train.offload_optimizer is cpu beside train.lora",
    "train.offload_optimizer=cpu train.zero_stage=2 cluster.device=cpu": "train.offload_optimizer is cpu, but cluster.",
    "checkpoint.merged=false": "checkpoint.merged is false, but without train.lora the policy is all that is trained",
    "train.lora.alpha=1e-9": "train.lora.alpha = 1e-09: must be greater than or equal to 0.001",
    **{
        f"train.lora.targets={value}": f"train.lora.targets = {shown}: must be all, or a list of 1 to 256 names"
        for value, shown in [("[]", "[]"), ("q_proj", "q_proj"), ("[1]", "[1]"), ("[a b]", "['a b']"), ("5", "5")]
    },
}


@pytest.mark.parametrize("overrides", COMBINATIONS)
def test_keys_that_do_not_go_together_are_refused(overrides: str) -> None:
    pairs = re.split(r" (?=[a-z_]+\.)", overrides)
    message = refusal(yaml.safe_dump(GOOD), *pairs)
    assert message and COMBINATIONS[overrides] in message


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN = {
    "empty": "",
    "spaces": "  \n\n",
    "comment": "# nothing",
    "null": "null",
    "number": "5",
    "list": "- model\n- data",
    "text": "model",
    "tab": "model:\n\tpath: x",
    "unclosed list": "model: {path: x}\ntrain: [1, 2",
    "unclosed quote": 'model: {path: "x}',
    "two documents": "model: {path: ./x}\n---\nmodel: {path: ./y}",
    "twice": "model: {path: ./x}\nmodel: {path: ./y}",
    "twice inside": "model:\n  path: ./x\n  path: ./y",
    "python object": "model: !!python/object/apply:os.system ['true']",
    "python name": "model: {path: !!python/name:os.system }",
    "unknown tag": "model: !thing {path: x}",
    "bad int": 'model: {path: !!int ""}',
    "bad float": "train: {learning_rate: !!float x}",
    "bad set": "model: !!set [a]",
    "binary": "model: {path: !!binary '@@@'}",
    "no anchor": "model: {path: *nothing}",
    "laughs": LAUGHS,
    "merges": MERGES,
    "merge": "model: &m {path: ./x}\ndata: {<<: *m}",
    "itself": "model: &m\n  path: *m",
    "deep": "[" * 20_000,
    "deep maps": "".join(" " * depth + "a:\n" for depth in range(3000)),
    "control": "model: {path: \x07}",
    "long": "#" * (MOST_CHARACTERS + 1),
    "key that is a list": "? [a, b]\n: 1\nmodel: {path: ./x}",
    "key that is a map": "? {a: b}\n: 1\nmodel: {path: ./x}",
    "key that is a number": "5: 1\nmodel: {path: ./x}",
    "key that is null": "~: 1\nmodel: {path: ./x}",
    "key that is empty": '"": 1\nmodel: {path: ./x}',
    "key that steers": '"\\e[31m\\n\\u202e": 1\nmodel: {path: ./x}',
    "long key": f"{'k' * 900}: 1\nmodel: {{path: ./x}}",
    "many keys": "".join(f"key{n}: {n}\n" for n in range(5000)),
    "digits": f"model: {{path: ./x}}\nrun: {{steps: {'9' * 5000}}}",
    "sexagesimal": "model: {path: ./x}\nrun: {steps: 1:2:3:4:5:6:7:8:9}",
    "null byte": "model: {path: a\0b}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_yaml_is_refused(name: str) -> None:
    assert refusal(BROKEN[name])


def test_no_file_is_read_for_ever(tmp_path: Path) -> None:
    for path in ("/dev/zero", "/dev/null", tmp_path, tmp_path / "none", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        well_formed(str(caught.value))
    (tmp_path / "utf16").write_bytes("model: {path: x}".encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "utf16")


KEYS = st.sampled_from([*Config.model_fields, *(part for name in LEAVES for part in name.split(".")), "x", "", "modle"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "dapo", "./x", "1e-6", "{question}", "\x1b[31m", "\u202e", "~/x", "../x", "s3://a"])
)
TREES = st.dictionaries(
    KEYS,
    st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(KEYS, SCALARS, max_size=2)),
    max_size=4,
)


@settings(max_examples=300)
@given(TREES)
def test_any_tree_of_known_keys_is_a_configuration_or_a_clear_refusal(tree: dict[str, Any]) -> None:
    refusal(yaml.safe_dump(GOOD | tree, allow_unicode=True))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([*LEAVES, "x.y", "train", "rewards.7.weight"]), st.text(max_size=20))))
def test_any_overrides_are_taken_or_clearly_refused(pairs: list[tuple[str, str]]) -> None:
    refusal(yaml.safe_dump(GOOD), *(f"{key}={value}" for key, value in pairs))


@pytest.mark.parametrize("override", ["\x1b[31mred", "\u202e=1", "a\nb", "train.betas.9\n=1", "x" * 500, "rewards.²=1"])
def test_an_override_cannot_steer_the_terminal(override: str) -> None:
    assert refusal(yaml.safe_dump(GOOD), override)


CLI = {
    "wrong type": ("run: {steps: many}", "run.steps = many: must be a valid integer"),
    "range": ("rollout: {samples_per_prompt: 1000000000}", "must be less than or equal to 1048576"),
    "misspelt": ("train: {learning_rat: 1}", "did you mean train.learning_rate?"),
    "enum": ("algorithm: {loss: ppo}", "must be 'dapo', 'grpo', 'dr_grpo', 'gspo',"),
    "preset": ("algorithm: {preset: ppo}", "must be 'grpo', 'deepseek_r1', 'deepseek_v3_2', 'dapo',"),
    "combination": ("sync: {every: 3}", "must be a multiple of sync.every = 3"),
    "unpinned": ("eval: {source: owner/rows}", "set eval.revision to its commit"),
    "steering": ('run: {name: "\\e]0;x\\a"}', "run.name = "),
    "nan": ("train: {learning_rate: .nan}", "must be a finite number"),
    "yaml": ("train: [", "not usable as YAML"),
    "up": ("run: {dir: ../../etc}", "must have no '..' in it"),
}


@pytest.mark.parametrize("name", CLI)
def test_the_command_line_says_it_in_one_block(tmp_path: Path, name: str) -> None:
    text, says = CLI[name]
    (tmp_path / "run.yaml").write_text(f"model: {{path: ./x}}\ndata: {{source: arithmetic}}\n{text}\n")
    command = [sys.executable, "-m", "grpo", "config", "show", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.rstrip("\n").isprintable()


@pytest.mark.parametrize("key", ["run.dir", "checkpoint.dir"])
@pytest.mark.parametrize("end", ["", "/", "//", "/.", "/./"])
def test_a_link_in_the_place_of_a_folder_to_write_to_is_refused_however_it_is_written(tmp_path, key, end):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}}}\ndata: {{source: arithmetic}}\n")
    with pytest.raises(ConfigError, match=f"{key} = .*: is a link to .*/kept; name the folder itself"):
        load_config(tmp_path / "run.yaml", [f"{key}={tmp_path}/link{end}"])
    load_config(tmp_path / "run.yaml", [f"{key}={tmp_path}/kept{end}"])


def test_a_pipe_or_a_device_in_the_place_of_a_file_to_read_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model/config.json")
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path}/model}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            tmp_path / "run.yaml", [f"data.source={tmp_path}/{{split}}.jsonl", f"eval.source={tmp_path}/zero.jsonl"]
        )
    assert str(caught.value).splitlines() == [
        f"{key} = {tmp_path}/{source}: {tmp_path}/{found} must be a regular file, but is a {kind}; take it away"
        for key, source, found, kind in (
            ("data.source", "train.jsonl", "train.jsonl", "pipe"),
            ("eval.source", "zero.jsonl", "zero.jsonl", "device"),
            ("model.path", "model", "model/config.json", "pipe"),
        )
    ]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_configuration_that_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read .must be a regular file, but is a "):
        load_config(tmp_path / "run.yaml")
