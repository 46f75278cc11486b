"""Weights & Biases and MLflow through their own libraries, imported only when the configuration asks for them.

Both go on with one run however often ours is started: the ids are kept in its folder. A row is never dropped because
the service has seen a later step, as after a recovery: W&B gets the step as an axis of its own.
"""

import importlib
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from grpo.config import Config
from grpo.config.diff import flatten
from grpo.errors import ConfigError
from grpo.run.layout import TRACKERS
from grpo.store import open_store
from grpo.store.files import NotAFile, json_object, read_regular
from grpo.types import Stats

LONGEST_KEY = 1024
LONGEST_PARAM, MOST_PARAMS = 500, 100  # characters, and parameters at a time, that every MLflow store takes


class Tracker(Protocol):
    """A service, or files, that are told every row of a run. It may raise anything: `tracking` says and counts it."""

    name: str

    def log(self, step: int, row: Stats) -> None:
        """Takes the numbers of one row; it must not wait for the service."""

    def rewind(self, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> None:
        """The run goes back to these rows; steps behind them will come again."""

    def close(self, ok: bool) -> None:
        """Sends what is left and says whether the run has succeeded."""


class WandbTracker:
    """One W&B run; its own client sends in the background and never stops the training."""

    name: str = "W&B"

    def __init__(self, config: Config, run_dir: Path) -> None:
        take_wandb_key()
        wandb = _import("wandb", "metrics.wandb_project", "wandb")
        known = kept_ids(run_dir).get("wandb")
        self._run: Any = wandb.init(
            project=config.metrics.wandb_project,
            name=config.run.name,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            id=known,
            resume="allow" if known else None,
        )
        keep_id(run_dir, "wandb", self._run.id)
        # W&B's own step only grows, and what comes with a lower one is dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: Stats) -> None:
        self._run.log({**row, "step": step})

    def rewind(self, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> None:
        """Nothing: steps that are made again are shown again."""

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


def take_wandb_key() -> None:
    """The key that WANDB_API_KEY_FILE names, for this process alone; where there is none W&B looks for one itself.

    Raises ConfigError for a file that cannot be read.
    """
    file = os.environ.get("WANDB_API_KEY_FILE")
    if file and not os.environ.get("WANDB_API_KEY"):
        try:
            os.environ["WANDB_API_KEY"] = read_regular(file, LONGEST_KEY).decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"WANDB_API_KEY_FILE: must be a file with a key, but: {error}; correct it") from error


def _for_mlflow(key: str) -> str:
    return re.sub(r"/{2,}", "/", re.sub(r"[^\w./ :-]", "_", key.replace("@", "_at_")))


class MlflowTracker:
    """One MLflow run in the experiment "grpo"; numbers are sent in the background.

    Its client and not `mlflow.log_metrics`, whose idea of the run at hand differs from thread to thread.
    """

    name: str = "MLflow"

    def __init__(self, config: Config, run_dir: Path) -> None:
        mlflow = _import("mlflow", "metrics.mlflow_uri", "mlflow-skinny")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=config.metrics.mlflow_uri)
        self._sent: deque[Any] = deque(maxlen=100)
        known = kept_ids(run_dir).get("mlflow")
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name("grpo")
        home = experiment.experiment_id if experiment else self._client.create_experiment("grpo")
        self._id = self._client.create_run(home, run_name=config.run.name).info.run_id
        params = flatten(config.model_dump(mode="json")).items()
        made = [self._entities.Param(key, str(value)[:LONGEST_PARAM]) for key, value in params]
        for first in range(0, len(made), MOST_PARAMS):
            self._client.log_batch(self._id, params=made[first : first + MOST_PARAMS])
        keep_id(run_dir, "mlflow", self._id)

    def log(self, step: int, row: Stats) -> None:
        now = int(time.time() * 1000)
        # MLflow allows few signs in a name and no empty part, and its stores differ about numbers that are not finite.
        named = {_for_mlflow(key): value for key, value in row.items() if math.isfinite(value)}
        made = [self._entities.Metric(key, value, now, step) for key, value in named.items()]
        self._sent.append(self._client.log_batch(self._id, metrics=made, synchronous=False))

    def rewind(self, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> None:
        """Nothing: steps that are made again are kept beside those before."""

    def close(self, ok: bool) -> None:
        for operation in self._sent:
            operation.wait()
        self._client.set_terminated(self._id, "FINISHED" if ok else "FAILED")


Service = tuple[str, str, type[WandbTracker] | type[MlflowTracker]]
"""Key of the configuration, name in TRACKERS, class."""


def wanted_services(config: Config) -> list[Service]:
    """What the configuration asks for. Raises ConfigError for a password in it."""
    metrics = config.metrics
    if urlsplit(metrics.mlflow_uri or "").password:
        raise ConfigError(
            "metrics.mlflow_uri: the configuration is written to the run's folder and must hold no password, but "
            "the URI has one; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    wanted: list[Service] = []
    if metrics.wandb_project is not None:
        wanted.append(("metrics.wandb_project", "wandb", WandbTracker))
    if metrics.mlflow_uri is not None:
        wanted.append(("metrics.mlflow_uri", "mlflow", MlflowTracker))
    return wanted


def kept_ids(run_dir: Path) -> dict[str, str]:
    """Ids of this run at the services, by their names; those that a damaged file does not say are begun anew."""
    try:
        ids = json_object(read_regular(run_dir / TRACKERS, 1 << 16))
    except (FileNotFoundError, NotAFile):
        return {}
    form = re.compile("[A-Za-z0-9_-]{1,64}")
    return {name: text for name, text in ids.items() if isinstance(text, str) and form.fullmatch(text)}


def keep_id(run_dir: Path, name: str, value: str) -> None:
    """Raises CheckpointError."""
    ids = kept_ids(run_dir) | {name: value}
    open_store(str(run_dir)).write(TRACKERS, json.dumps(ids, indent=1).encode())


def _import(package: str, key: str, distribution: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"{key}: needs the package {package}, but it is not installed; run `pip install {distribution}` "
            "or set the key to null"
        ) from error
