"""After the last step: the policy, the report and metrics.jsonl, copied to where they are wanted.

    <run.results>/<run.name>/
        policy/         Hugging Face folder: safetensors, tokenizer; not with checkpoint.merged: false
        adapter/        PEFT's folder, of a run with train.lora
        report.html, metrics.jsonl
        manifest.json   written last: size and sha256 of every other file

On a volume the folder gets its name when it is whole; in a bucket it counts from the moment its manifest.json is there.
"""

import contextlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from grpo.checkpoint.commit import ADAPTER, MANIFEST, POLICY
from grpo.checkpoint.export import PartMissing, export
from grpo.config import Config
from grpo.errors import ConfigError, GrpoError, Interrupted, ResultsError
from grpo.run.layout import METRICS, REPORT
from grpo.store import Store, open_store
from grpo.types import FileRecord

LONGEST_PAUSE = 30.0
Say = Callable[[str], None]


class Results(BaseModel):
    """What manifest.json says."""

    model_config = ConfigDict(frozen=True)

    run: str
    files: tuple[FileRecord, ...]


def deliver(config: Config, run_dir: Path, say: Say = print) -> str:
    """Copies the results to run.results and returns where they are; "" if the configuration names no place.

    What fails is tried again until `deadlines.save` is over. Raises ResultsError: the run itself is done, and the same
    command copies once more. Raises ConfigError, at once, where the run has not kept what is to be copied.
    """
    if config.run.results is None:
        return ""
    again = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_delay(config.deadlines.save),
        wait=wait_exponential(max=min(LONGEST_PAUSE, config.deadlines.save)),
        before_sleep=lambda state: say(f"run.results: {state.outcome.exception() if state.outcome else ''}; once more"),
        reraise=True,
    )
    store = open_store(config.run.results)
    try:
        for attempt in again:
            with attempt:
                return _copy(store, config.run.name, run_dir, parts(config))
    except (ConfigError, Interrupted):
        raise
    except PartMissing as error:
        raise ConfigError(
            f"run.results: the run is done and whole in {run_dir}, but it has not kept all that is to be copied: "
            f"{error}; or, to copy the adapter alone, give the same command with checkpoint.merged=false"
        ) from error
    except GrpoError as error:
        raise ResultsError(
            f"run.results: the run is done and whole in {run_dir}, but its results could not be copied to "
            f"{store.path(config.run.name)}: {error}; mend that and give the same command, which only copies"
        ) from error
    raise AssertionError("tenacity ends with a result or an error")


def _may_pass(error: BaseException) -> bool:
    """Whether a later try may succeed."""
    return isinstance(error, GrpoError) and not isinstance(error, ConfigError | Interrupted | PartMissing)


def parts(config: Config) -> list[str]:
    """Folders of a checkpoint that are results."""
    lora = config.train.lora is not None
    return [POLICY] * (config.checkpoint.merged or not lora) + [ADAPTER] * lora


def _copy(store: Store, name: str, run_dir: Path, wanted: list[str]) -> str:
    folder = f"{name}.tmp-{uuid.uuid4().hex[:12]}" if store.renames else name
    try:
        with store.workspace(folder) as work:
            with store.filling(work, folder):
                for part in wanted:
                    export(run_dir, work / part, part=part)
                for file in (REPORT, METRICS):
                    shutil.copyfile(run_dir / file, work / file)
            if not store.renames:
                store.delete(f"{name}/{MANIFEST}")
            made = Results(run=name, files=store.publish(work, folder))
        if not store.renames:
            for old in set(store.names(name)) - {f"{name}/{file.name}" for file in made.files}:
                store.delete(old)
        store.write(f"{folder}/{MANIFEST}", made.model_dump_json(indent=1).encode())
        if store.renames and _read(store, name) != made:
            _replace(store, folder, name)
    finally:
        if store.renames:
            with contextlib.suppress(GrpoError):
                store.delete(folder)
    return store.path(name)


def _replace(store: Store, folder: str, name: str) -> None:
    """What an earlier start has copied makes room, and goes once the new folder has its name."""
    aside = f"{folder}.old"
    if store.exists(name):
        store.rename(name, aside)
    store.rename(folder, name)
    store.delete(aside)


def _read(store: Store, name: str) -> Results | None:
    try:
        return Results.model_validate_json(store.read(f"{name}/{MANIFEST}"))
    except (GrpoError, ValidationError):
        return None
