"""Presets and the combinations of `algorithm` that make no sense: what holds, and why something does not."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grpo.config import Algorithm, Config
from grpo.config.load import dump_config, load_config
from grpo.config.variants import OWN_KEYS, PRESETS, VARIANTS, LossName, PresetName
from grpo.errors import ConfigError

DOCS = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
OTHER: dict[str, Any] = {
    "clip_low": 0.15,
    "clip_high": 0.35,
    "kl": "k3",
    "kl_coef": 0.07,
    "off_policy_mask": 0.9,
    "aggregation": "token_mean",
    "advantage_std": "batch",
    "baseline": "mean",
    "correction": "tis",
    "drop_zero_variance": False,
    "reward_combination": "sum_then_normalise",
    "rollout.refill": False,
    "model.fp32_head": False,
}
"""For each key of a preset another value, which goes with the rest of it."""


def loaded(folder: Path, sections: dict[str, Any], *overrides: str) -> Config:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": "./model"}, "data": {"source": "arithmetic"}} | sections))
    return load_config(file, overrides)


def value(config: Config, key: str) -> object:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section or "algorithm"), name)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_shown_with_all_that_it_fills_in_and_reads_back(tmp_path, preset):
    config = loaded(tmp_path, {}, f"algorithm.preset={preset}")
    assert {key: value(config, key) for key in PRESETS[preset]} == PRESETS[preset]
    shown = dump_config(config)
    tree = yaml.safe_load(shown)
    for key, expected in PRESETS[preset].items():
        section, _, name = key.rpartition(".")
        assert tree[section or "algorithm"][name] == expected
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml") == config
    without = tree | {"algorithm": tree["algorithm"] | {"preset": None}}
    assert Config.model_validate(without).algorithm == config.algorithm.model_copy(update={"preset": None})


@pytest.mark.parametrize(
    ("preset", "key"), [(preset, key) for preset, keys in PRESETS.items() for key in keys if key != "loss"]
)
def test_a_key_that_is_written_wins(tmp_path, preset, key):
    section, _, name = key.rpartition(".")
    own = {name: OTHER[key]}
    sections = {"algorithm": {"preset": preset} | ({} if section else own)} | ({section: own} if section else {})
    sections["model"] = {"path": "./model"} | sections.get("model", {})
    for config in (
        loaded(tmp_path, sections),
        loaded(tmp_path, {}, f"algorithm.preset={preset}", f"{section or 'algorithm'}.{name}={OTHER[key]}"),
    ):
        expected = PRESETS[preset] | {key: OTHER[key]}
        assert {key: value(config, key) for key in expected} == expected
    assert OTHER[key] != PRESETS[preset][key]


def test_without_kl_a_preset_has_no_estimate_of_it(tmp_path):
    for preset in ("reinforce_baseline", "deepseek_v3_2"):
        algorithm = loaded(tmp_path, {"algorithm": {"preset": preset, "kl_coef": 0}}).algorithm
        assert (algorithm.kl, algorithm.kl_coef) == ("k3", 0.0)
    k1 = loaded(tmp_path, {"algorithm": {"preset": "deepseek_v3_2", "kl": "k1"}}).algorithm
    assert (k1.kl, k1.kl_coef) == ("k1", 0.001)


@pytest.mark.parametrize("loss", VARIANTS)
def test_a_loss_fills_in_its_own_keys_and_no_others(loss):
    algorithm, variant = Algorithm(loss=loss), VARIANTS[loss]
    assert algorithm.aggregation == variant.aggregation
    assert {key: getattr(algorithm, key) for key in OWN_KEYS} == dict.fromkeys(OWN_KEYS) | dict(variant.keys)
    assert Algorithm(loss=loss, **dict.fromkeys(OWN_KEYS), aggregation=None) == algorithm, "null: as the loss has it"


def test_names_and_tables_say_the_same():
    assert get_args(LossName) == tuple(VARIANTS) and get_args(PresetName) == tuple(PRESETS)
    assert len(PRESETS) == 16
    sections: dict[str, Any] = {"": Algorithm.model_fields, **{n: f.annotation for n, f in Config.model_fields.items()}}
    for keys in PRESETS.values():
        for key in keys:
            section, _, name = key.rpartition(".")
            fields = sections[section]
            assert name in (fields if section == "" else fields.model_fields)


def rows(title: str) -> dict[str, str]:
    """Of the first table below a heading of docs/algorithms.md: first cell, the rest."""
    part = DOCS.split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", part.partition("\n|---")[2], flags=re.MULTILINE))


def test_the_documents_table_of_presets_is_the_codes():
    told = {
        name: {key: yaml.safe_load(text) for key, text in re.findall(r"`([\w.]+): ([^`]+)`", cells)}
        for name, cells in rows("Presets").items()
    }
    assert told == {name: dict(keys) for name, keys in PRESETS.items()}


def test_the_documents_table_of_losses_names_each_with_its_aggregation():
    told = {name: cells.split(" | ")[1] for name, cells in rows("Losses").items()}
    assert told == {
        name: f"`{variant.aggregation}`" + " alone" * bool(variant.only) for name, variant in VARIANTS.items()
    }


@pytest.mark.parametrize("name", ["loss", "preset"])
def test_the_bounds_of_luspo_are_those_of_its_paper(name):
    made = Algorithm.model_validate({name: "luspo"})
    assert (made.clip_low, made.clip_high, made.aggregation, made.kl_coef) == (0.002, 0.0025, "sequence_sum", 0.0)


def taking(key: str) -> str:
    return ", ".join(name for name, variant in VARIANTS.items() if key in variant.keys)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preset of another loss": (
        {"preset": "gspo", "loss": "dapo"},
        "preset gspo sets the keys of loss gspo, but loss = dapo; write loss: gspo, or remove one of the two",
    ),
    "bound of a loss without one": (
        {"loss": "reinforce", "clip_high": 0.3},
        f"clip_high belongs to the losses {taking('clip_high')}, but loss = reinforce; remove it or choose one of tho",
    ),
    "dual clip of a cap": (
        {"loss": "cispo", "dual_clip": 3},
        f"dual_clip belongs to the losses {taking('dual_clip')}, but loss = cispo; remove it or choose one of those",
    ),
    "gate of another": ({"sapo_temperature": [1, 1]}, "sapo_temperature belongs to the losses sapo, but loss = dapo"),
    "k of another": ({"vespo_k": [1, 1]}, "vespo_k belongs to the losses vespo, but loss = dapo; remove it or choose"),
    "lambda of another": ({"loss": "sapo", "vespo_lambda": [1, 1]}, "vespo_lambda belongs to the losses vespo, but"),
    **{
        f"{loss} by {aggregation}": (
            {"loss": loss, "aggregation": aggregation},
            f"{loss} with aggregation = {aggregation} is not {loss}: {VARIANTS[loss].only}; use aggregation: "
            f"{VARIANTS[loss].aggregation} or another loss",
        )
        for loss, own in [("gspo", "sequence_mean"), ("gspo_token", "sequence_mean"), ("luspo", "sequence_sum")]
        for aggregation in ("token_mean", "sequence_mean", "prompt_mean", "sequence_sum", "constant")
        if aggregation != own
    },
    **{
        f"vespo with {correction}": (
            {"loss": "vespo", "correction": correction},
            "no weight may count twice: vespo takes correction: none, as its ratio is that of whole sequences by the "
            f"sampler, which is the whole weight already; but correction = {correction}, remove it",
        )
        for correction in ("tis", "icepop", "seq_mask", "geo_mask", "decoupled")
    },
    "estimate of no KL": ({"kl": "k1"}, "no reference model is loaded: kl = k1, but kl_coef = 0; set kl_coef, or remo"),
    "target of no KL": (
        {"kl_target": 0.1},
        "is loaded: kl_target = 0.1, but kl_coef = 0; set kl_coef, or remove kl_ta",
    ),
    "leave one out by the group": (
        {"baseline": "leave_one_out", "advantage_std": "group"},
        "leave_one_out is the mean baseline times G / (G - 1), which a group's std takes out again: baseline = leave_o",
    ),
    **{
        f"normalised twice: {key}": (
            {"reward_combination": "normalise_then_sum", key: other},
            f"another normalisation would be the second of its kind: {key} = {other}, remove it",
        )
        for key, other in [("advantage_std", "whiten"), ("advantage_std", "none"), ("advantage_std", "batch")]
    },
    "normalised with another baseline": (
        {"reward_combination": "normalise_then_sum", "baseline": "leave_one_out", "advantage_std": "whiten"},
        "another normalisation would be the second of its kind: advantage_std = whiten, remove it",
    ),
    "a penalty on no scale": (
        {"reward_combination": "normalise_then_sum", "overlong": {"buffer": 16}},
        "but with normalise_then_sum each reward is on a scale of its own; remove overlong, or use reward_combination:",
    ),
    "a KL on no scale": (
        {"preset": "gdpo", "kl": "k1", "kl_coef": 0.1},
        "a penalty is on the scale of the summed reward, but with normalise_then_sum each reward is on a scale of its "
        "own; remove kl: k1, or use reward_combination: sum_then_normalise",
    ),
    "bound of the whole weight": (
        {"preset": "decoupled", "correction_high": 2},
        "decoupled takes the whole weight: algorithm.correction_high = 2, but algorithm.correction is decoupled; use t",
    ),
    "bound of nothing": (
        {"correction_low": 0.1},
        "bounds need something that they bound: algorithm.correction_low = 0.1, but algorithm.correction is none",
    ),
    "penalty longer than a completion": (
        {"overlong": {"buffer": 513}},
        "algorithm.overlong.buffer = 513 must be at most rollout.max_tokens = 512",
    ),
    "unknown loss": ({"loss": "ppo"}, f"algorithm.loss = ppo: must be {', '.join(map(repr, list(VARIANTS)[:-1]))} or"),
    "unknown preset": ({"preset": ["dapo"]}, "algorithm.preset = ['dapo']: must be 'grpo', 'deepseek_r1'"),
    "no loss": ({"loss": None}, f"algorithm.loss = null: must be {next(iter(VARIANTS))!r}, "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(tmp_path, name):
    settings, sentence = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        loaded(tmp_path, {"algorithm": settings})
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_what_goes_together_is_taken(tmp_path):
    for settings in (
        {"loss": "vespo", "correction": "none"},
        {"loss": "gspo", "correction": "geo_mask", "aggregation": "sequence_mean"},
        {"baseline": "leave_one_out", "advantage_std": "whiten"},
        {"reward_combination": "normalise_then_sum", "kl": "k2", "kl_coef": 0.1},
        {"kl": "k1", "kl_coef": 0.1, "kl_target": 0.5},
    ):
        config = loaded(tmp_path, {"algorithm": settings})
        assert {key: getattr(config.algorithm, key) for key in settings} == settings
    late = loaded(tmp_path, {"algorithm": {"loss": "vespo"}, "rollout": {"max_staleness": 2}})
    assert late.default_correction == "none"
