"""What a run reads, as its pods will find it: a folder of this machine becomes a file of the values or a claim."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo.config import Config, RewardFunction
from grpo.config.paths import ARITHMETIC, is_data_file, is_hub_data, is_hub_model, is_local
from grpo.errors import ConfigError
from grpo.store.files import read_regular

IN_PODS = ("/runs/", "/opt/grpo/")
"""Folders of the pods: the volume of runs, and what the images hold."""
SHIPPED = "examples/quickstart/model"
"""A model that the images hold."""
CHECKOUT = str(Path(__file__).parents[2])
INLINE_BYTES = 500_000
"""Of files in values, that the chart takes."""
HTTPS = 443
LAUNCHER = {"run": ("name", "dir", "grace_seconds"), "cluster": ("address", "environment"), "metrics": ("port",)}
"""Keys that say how a run is started here; the chart fills in its own."""

Tree = dict[str, Any]


@dataclass
class Inputs:
    """The configuration for the chart, values beside it, what is `needed` beforehand, and ports that the pods call."""

    config: Tree
    values: Tree = field(default_factory=dict)
    needed: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


def inputs_of(config: Config) -> Inputs:
    """Of a run that was written for this machine. Raises ConfigError for what cannot be brought to pods."""
    made = Inputs(config.model_dump(mode="json", exclude_unset=True))
    _launcher(config, made)
    _model(config, made)
    _rows(config, made)
    _code(config, made)
    _outside(config, made)
    made.config = {key: section for key, section in made.config.items() if section != {}}
    return made


def in_pods(path: str) -> bool:
    """Whether the path is one of the pods already."""
    return f"{os.path.normpath(path)}/".startswith(IN_PODS)


def _launcher(config: Config, made: Inputs) -> None:
    kept = in_pods(config.run.dir)
    for section, keys in LAUNCHER.items():
        for key in keys:
            if not (kept and key in ("name", "dir")):
                made.config.get(section, {}).pop(key, None)
    for section, key, place in (("run", "results", config.run.results), ("checkpoint", "dir", config.checkpoint.dir)):
        if place is not None and not (place.startswith("s3://") or in_pods(place)):
            made.config[section].pop(key, None)  # below the run's folder, which is on the claim of runs


def _model(config: Config, made: Inputs) -> None:
    path, here = config.model.path, os.path.normpath(config.model.path)
    if is_hub_model(path):
        made.ports.append(HTTPS)
        made.needed.append(f"the pods reach the hub for {path} (networkPolicy.extraEgress)")
    elif os.path.abspath(here) == os.path.join(CHECKOUT, SHIPPED):
        made.config["model"]["path"] = f"/opt/grpo/{SHIPPED}"
    elif not in_pods(path):
        name = os.path.basename(os.path.abspath(here))
        for key in ("path", "revision"):
            made.config["model"].pop(key, None)
        made.values["model"] = {"claim": "models", "path": name}
        made.needed.append(f"a claim `models` with the folder {name}, a copy of {path} (or model.url instead)")


def _rows(config: Config, made: Inputs) -> None:
    """Files that are small become values; else a claim holds all rows."""
    named = [(keys, path, splits) for keys, path, splits in _row_places(config) if not _elsewhere(path, splits)]
    if any(is_hub_data(path.replace("{split}", splits[0])) for _, path, splits in _row_places(config)):
        made.ports.append(HTTPS)
        made.needed.append("the pods reach the hub for the rows (networkPolicy.extraEgress)")
    if not named:
        return
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for _, path, _ in named])
    names = {path: os.path.relpath(os.path.abspath(path), top) for _, path, _ in named}
    texts = _small([(names[path].replace("{split}", split), path.replace("{split}", split))
                    for _, path, splits in named for split in splits])  # fmt: skip
    folder = "/etc/grpo/data" if texts else "/mnt/data"
    made.values["data"] = {"files": texts} if texts else {"claim": "data"}
    if not texts:
        made.needed.append(f"a claim `data` with {', '.join(sorted(set(names.values())))}, copied from {top}")
    for keys, path, _ in named:
        section: Any = made.config
        for key in keys[:-1]:
            section = section.setdefault(key, {}) if isinstance(section, dict) else section[key]
        section[keys[-1]] = f"{folder}/{names[path]}"


def _row_places(config: Config) -> Iterator[tuple[tuple[str | int, ...], str, Sequence[str]]]:
    """Key, path and splits of each place that rows are read from."""
    held_out = config.eval
    also = (held_out.split,) if held_out.prompts and held_out.source is None else ()
    if config.data.sources:
        for index, source in enumerate(config.data.sources):
            yield ("data", "sources", index, "source"), source.source, tuple({source.split: 0, **dict.fromkeys(also)})
    else:
        yield ("data", "source"), config.data.source, tuple({config.data.split: 0, **dict.fromkeys(also)})
    if held_out.source is not None and held_out.prompts:
        yield ("eval", "source"), held_out.source, (held_out.split,)


def _elsewhere(path: str, splits: Sequence[str]) -> bool:
    """Whether these rows are no files of this machine: made up, on the hub, or in the pods."""
    first = path.replace("{split}", splits[0])
    return path == ARITHMETIC or in_pods(path) or not (is_data_file(first) or is_local(first) or os.path.isdir(first))


def _small(files: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Texts of these files by name; {} if one is no small text, or all together are too large for values."""
    texts: dict[str, str] = {}
    for name, path in files:
        try:
            texts[name] = read_regular(path, INLINE_BYTES).decode()
        except (OSError, ValueError):
            return {}
    return texts if sum(len(text.encode()) for text in texts.values()) <= INLINE_BYTES else {}


def _code(config: Config, made: Inputs) -> None:
    """Reward functions of one's own: the modules that they are in, or all of `reward_code.folder`."""
    folder = config.reward_code.folder
    if folder is not None and in_pods(folder):
        return
    own = {
        reward.function.partition(":")[0]
        for reward in _rewards(config)
        if reward.url is None and ":" in reward.function
    }
    if not own:
        return
    top = Path(folder or ".")
    files = sorted(path for path in _modules(top, own if folder is None else None) if path.is_file())
    if not files:
        made.needed.append(f"the controller's image holds {', '.join(sorted(own))} (or code.files)")
        return
    texts = _small([(str(path.relative_to(top)), str(path)) for path in files])
    if not texts:
        raise ConfigError(
            f"reward code of {len(files)} files in {top} must be text of at most {INLINE_BYTES} bytes to be in the "
            "values; put it into the controller's image and set code.imagePath, or name a smaller reward_code.folder"
        )
    section = made.config.get("reward_code", {})
    for key in ("folder", "revision"):
        section.pop(key, None)
    made.values["code"] = {"files": texts}
    if config.reward_code.readable:
        made.needed.append(
            f"reward_code.readable names places of the head's pod: {', '.join(config.reward_code.readable)}"
        )


def _rewards(config: Config) -> list[RewardFunction]:
    return [*config.rewards, *(reward for source in config.data.sources for reward in source.rewards)]


def _modules(top: Path, names: set[str] | None) -> Iterator[Path]:
    if names is None:
        yield from (path for path in top.rglob("*.py") if "__pycache__" not in path.parts)
        return
    for name in sorted({name.partition(".")[0] for name in names}):
        yield top / f"{name}.py"
        yield from (path for path in (top / name).rglob("*.py") if "__pycache__" not in path.parts)


def _outside(config: Config, made: Inputs) -> None:
    """Services and buckets that the pods call, and what they want to know."""
    urls = list(dict.fromkeys(reward.url for reward in _rewards(config) if reward.url is not None))
    made.ports += [_port(url) for url in urls]
    if urls:
        made.needed.append(f"the head reaches {', '.join(urls)}; tokens in head.env from a Secret")
    if any(str(place or "").startswith("s3://") for place in (config.checkpoint.dir, config.run.results)):
        made.ports.append(HTTPS)
        made.needed.append("the bucket, and secrets.s3 or a cloud identity (serviceAccount.annotations)")
    if config.metrics.wandb_project is not None:
        made.ports.append(HTTPS)
        made.needed.append("a controller's image with wandb, and its key in a Secret that secrets.wandb names")
    if config.metrics.mlflow_uri is not None and "://" in config.metrics.mlflow_uri:
        made.ports.append(_port(config.metrics.mlflow_uri))
        made.needed.append(f"a controller's image with mlflow-skinny, whose head reaches {config.metrics.mlflow_uri}")
    files = {"data.chat_template": config.data.chat_template, "reward_http.ca_file": config.reward_http.ca_file}
    for key, path in files.items():
        if path is not None and os.path.isfile(path) and not in_pods(path):
            made.needed.append(
                f"{key} = {path} is a file of this machine: mount it in the head, and name it as it is there"
            )
    made.ports = sorted(set(made.ports))


def _port(url: str) -> int:
    try:
        parts = urlsplit(url)
        return parts.port or (80 if parts.scheme == "http" else HTTPS)
    except ValueError:
        return HTTPS
