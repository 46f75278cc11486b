"""Whether a configuration is the one that a run was begun with."""

import hashlib
import json
from collections.abc import Mapping

from grpo.config.schema import Config, Model
from grpo.config.variants import filled
from grpo.errors import ConfigError

MOST_CHANGES, LONGEST_CHANGE = 40, 400
FREE = {
    "run.dir",
    "run.results",
    "run.resume",
    "run.restart",
    "run.allow_drift",
    "run.lease_seconds",
    "run.grace_seconds",
    "run.max_recoveries",
    "reward_code.workers",
    "rollout.engines",
    "reward_code.isolation",
}
FREE_SECTIONS = {"metrics", "deadlines", "cluster", "checkpoint", "sft"}
"""What may change between two starts: it says where and how a run is run, not what it computes.

What a warm-up takes from `sft` stands in the other sections of its own configuration (`supervised.py`).
"""


def config_hash(config: Config) -> str:
    """sha256 over every key."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def check_config_diff(old: Mapping[str, object], config: Config) -> None:
    """Compares with the configuration that a checkpoint holds, as JSON; a key that it lacks had its default then.

    Raises ConfigError with every key that differs and is not in run.allow_drift, and for a key there that is none.
    """
    defaults = flatten(Config(model=Model(path="-")).model_dump(mode="json"))
    before, now = defaults | flatten(_of_its_loss(old)), flatten(config.model_dump(mode="json"))
    unknown = sorted(set(config.run.allow_drift) - set(before))
    if unknown:
        raise ConfigError(f"run.allow_drift: must name keys such as train.learning_rate, but {unknown[0]} is none")
    tokens = "train.tokens_per_micro_batch"
    if now[tokens] == "auto" and before[tokens] == config.fixed_tokens:  # an older default; a run keeps its own
        before[tokens] = "auto"
    allowed = FREE | set(config.run.allow_drift)
    changes = [
        f"{key}: {json.dumps(before[key])} -> {json.dumps(now[key]) if key in now else 'no such key'}"
        for key in before
        if key not in allowed and key.partition(".")[0] not in FREE_SECTIONS
        if key not in now or before[key] != now[key]
    ]
    if changes:
        keys = ", ".join(change.partition(":")[0] for change in changes[:MOST_CHANGES])
        rest = len(changes) - MOST_CHANGES
        shown = changes[:MOST_CHANGES] + [f"and {rest} more"] * (rest > 0)
        allow = "" if rest > 0 else f" allow them with 'run.allow_drift=[{keys}]',"
        raise ConfigError(
            "a run is resumed with the configuration that it was begun with, but these keys differ:\n  "
            + "\n  ".join(change[:LONGEST_CHANGE] + "..." * (len(change) > LONGEST_CHANGE) for change in shown)
            + f"\nset them back,{allow} or choose another run.dir"
        )


def _of_its_loss(old: Mapping[str, object]) -> Mapping[str, object]:
    """With what the loss fills in: an older version did not write it."""
    algorithm = old.get("algorithm")
    return {**old, "algorithm": filled(algorithm)} if isinstance(algorithm, Mapping) else old


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"train": {"epochs": 1}} -> {"train.epochs": 1}; a list is one value, without what its items leave open.

    A mapping inside of a section is one value too.
    """
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            flat |= flatten(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = _without_null(value)
    return flat


def _without_null(value: object) -> object:
    """Items of an older version lack keys; those are null by default in newer ones."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
