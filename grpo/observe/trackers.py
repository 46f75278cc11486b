"""Weights & Biases and MLflow through their own libraries, imported only when the configuration asks for them."""

import importlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from grpo.config import Config
from grpo.config.diff import flatten
from grpo.errors import ConfigError
from grpo.types import Stats


class Tracker(Protocol):
    """A service that is told every row of a run."""

    def log(self, step: int, row: Stats) -> None:
        """Takes the numbers of one row; it must not wait for the service."""

    def close(self, ok: bool) -> None:
        """Sends what is left and says whether the run has succeeded."""


class WandbTracker:
    """One W&B run; its own client sends in the background and never stops the training."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        wandb = _import("wandb", "metrics.wandb_project", "wandb")
        try:
            self._run = wandb.init(
                project=config.metrics.wandb_project,
                name=config.run.name,
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"metrics.wandb_project: W&B must accept the run, but says: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or set it to null"
            ) from error

    def log(self, step: int, row: Stats) -> None:
        self._run.log(row, step=step)

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class MlflowTracker:
    """One MLflow run in the experiment "grpo"; numbers are sent in the background."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        uri = config.metrics.mlflow_uri
        if urlsplit(uri or "").password:
            raise ConfigError(
                "metrics.mlflow_uri: the configuration is written to the run's folder and must hold no password, but "
                "the URI has one; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        self._mlflow = _import("mlflow", "metrics.mlflow_uri", "mlflow-skinny")
        try:
            self._mlflow.set_tracking_uri(uri)
            self._mlflow.set_experiment("grpo")
            self._mlflow.start_run(run_name=config.run.name)
            self._mlflow.log_params(flatten(config.model_dump(mode="json")))
        except self._mlflow.exceptions.MlflowException as error:
            raise ConfigError(
                f"metrics.mlflow_uri: MLflow must accept the run at {uri}, but says: {error}; correct the URI or "
                "set it to null"
            ) from error

    def log(self, step: int, row: Stats) -> None:
        # MLflow allows no "@" in a name, and its stores differ about numbers that are not finite.
        named = {key.replace("@", "_at_"): value for key, value in row.items() if math.isfinite(value)}
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self, ok: bool) -> None:
        try:
            self._mlflow.end_run("FINISHED" if ok else "FAILED")
        except self._mlflow.exceptions.MlflowException as error:
            # The training is done and its numbers are in the run's folder: a lost server must not make it a failure.
            logging.getLogger(__name__).warning("MLflow did not hear of the end of the run: %s", error)


def wanted_trackers(config: Config) -> list[Callable[[Config, Path], Tracker]]:
    """The trackers that the configuration asks for. Making one raises ConfigError if it cannot work."""
    wanted: list[Callable[[Config, Path], Tracker]] = []
    if config.metrics.wandb_project is not None:
        wanted.append(WandbTracker)
    if config.metrics.mlflow_uri is not None:
        wanted.append(MlflowTracker)
    return wanted


def close_tracker(tracker: Tracker) -> Callable[..., None]:
    """An exit function, as ExitStack takes it, that tells the tracker whether the run has succeeded."""

    def close(kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        tracker.close(ok=kind is None)

    return close


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
