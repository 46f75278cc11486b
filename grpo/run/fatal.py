"""FATAL.json: why a run ended that would end alike again, so that a retry stops in a moment instead of rebuilding all.

Kubernetes retries a job that met a reward function that always fails just as it retries one that lost its node.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import grpo
from grpo import errors
from grpo.config import Config
from grpo.config.diff import config_hash
from grpo.errors import CheckpointError, ConfigError, DataError, GrpoError
from grpo.store import open_store
from grpo.store.files import json_object

FATAL = "FATAL.json"
FORGIVEN = (ConfigError, DataError)
"""Found again within seconds, and likely mended outside of the configuration: not held against a new start, unless an
actor found it, minutes later."""


def write_fatal(run_dir: Path, error: GrpoError, config_hash: str) -> None:
    """Leaves FATAL.json for an error of a `fatal` class, unless it is there: then `check_fatal` has raised this one.

    It never hides the error by one of its own.
    """
    if not error.fatal:
        return
    message = str(error)
    content = {
        "class": type(error).__name__,
        "exit_code": error.exit_code,
        "message": message,
        "late": bool(error.traceback),
        "next": message.rpartition("; ")[2],
        "config_hash": config_hash,
        "version": grpo.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with contextlib.suppress(CheckpointError):  # a full disk; the run's own error is what counts
        open_store(str(run_dir)).write_new(FATAL, json.dumps(content, indent=1).encode())


def check_fatal(run_dir: Path, config: Config) -> None:
    """Raises the error that ended this run, if the configuration is still the same; else removes FATAL.json.

    Call it while holding the run's folder.
    """
    store = open_store(str(run_dir))
    if not store.exists(FATAL):
        return
    found = json_object(store.read(FATAL))  # a damaged one only saved time
    kind = _held(found)
    if kind and found.get("config_hash") == config_hash(config):
        raise kind(
            f"{run_dir}: this run ended with: {found.get('message')} (at {found.get('time')}); the configuration is "
            f"the same, so it would end alike; once the cause is mended set run.restart to another text (now "
            f"{config.run.restart or 'none'}; job.restart of the chart), or delete {run_dir / FATAL}"
        )
    store.delete(FATAL)


def _held(found: Mapping[str, object]) -> type[GrpoError] | None:
    """The class of an error that still stands."""
    kind = getattr(errors, str(found.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, GrpoError) and kind.fatal):
        return None
    return kind if found.get("late") is True or not issubclass(kind, FORGIVEN) else None
