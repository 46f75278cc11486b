"""`grpo k8s fetch`: policy, report and metrics.jsonl of a run that is done, by the command of the chart's notes."""

import contextlib
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from grpo.checkpoint.commit import ADAPTER, MANIFEST, POLICY
from grpo.checkpoint.results import Results
from grpo.config.text import clean
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, DiskError, GrpoError, ResultsError
from grpo.kubernetes.logs import Say, opened
from grpo.kubernetes.release import Release
from grpo.kubernetes.tools import LONGEST, Cluster
from grpo.run.layout import METRICS, REPORT
from grpo.store.fetch import fetch as fetch_url
from grpo.store.fetch import items_of
from grpo.store.files import remove_tree
from grpo.store.volume import Volume
from grpo.types import FileRecord

MODEL, ADAPTED = f"{POLICY}/config.json", f"{ADAPTER}/adapter_config.json"
NEEDED = (REPORT, METRICS)


@dataclass(frozen=True)
class Place:
    """Where the chart's notes say that results are: at a URL, or behind `kubectl run` with these arguments."""

    url: str = ""
    namespace: str = ""
    arguments: tuple[str, ...] = ()


def fetch(release: Release, out: Path, say: Say, seconds: float) -> None:
    """Brings the results into a folder that is made: whole and compared, or absent. Raises GrpoError, a sentence."""
    check_ended(release)
    place = place_of(release.cluster.helm("get", "notes", release.name))
    if place is None:
        raise ResultsError(
            f"results must be in results.url, results.claim or on the claim of runs, but release {release.name} has "
            f"none of them; set results.url, and helm upgrade with another job.restart, which copies them there"
        )
    if place.url:
        for item in items_of(place.url, out, []):
            fetch_url(item, say=say)
        return
    check_out(out)
    with _scratch(out) as scratch:
        bring(release.cluster, place, scratch, seconds)
        compare(scratch, release.run)
        os.replace(scratch, out)
    say(f"{out}: {POLICY}, {REPORT} and {METRICS} of run {release.run}")


def check_ended(release: Release) -> None:
    """Raises ClusterError for a run that goes on, ResultsError for one that has failed."""
    rule = f"results are there once a run has SUCCEEDED, but {release}"
    if release.succeeded:
        return
    if release.over:
        raise ResultsError(f"{rule}: {release.short_message}; mend the cause, then helm upgrade")
    raise ClusterError(f"{rule}; `grpo k8s logs -f {release.name}{release.cluster.told()}` shows how far it is")


def check_out(out: Path) -> None:
    """Raises ConfigError where something is there already, or the folder cannot be made."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"{out}: must be a folder to make, but is there already; give another")


def place_of(notes: str) -> Place | None:
    """What the chart's notes say of the results; None: nothing."""
    for line in notes.splitlines():
        if url := re.fullmatch(r"\s*grpo fetch (\S+://\S+) OUT\s*", line):
            return Place(url=url[1])
        command = re.fullmatch(r"\s*mkdir OUT && echo \| kubectl (.*) \| tar x -C OUT\s*", line)
        if command is None:
            continue
        try:
            words = shlex.split(command[1])
        except ValueError:
            continue
        if words[:1] == ["-n"] and words[2:3] == ["run"] and len(words) > 4:
            return Place(namespace=words[1], arguments=tuple(words[2:]))
    return None


def bring(cluster: Cluster, place: Place, folder: Path, seconds: float) -> None:
    """Runs the pod that writes the results as a tar, and unpacks it. The pod is gone in the end."""
    pod = f"{place.arguments[1]}-{uuid.uuid4().hex[:6]}"
    here = Cluster(place.namespace, cluster.context)
    command = here.command("kubectl", "run", pod, *place.arguments[2:])
    with tempfile.TemporaryFile() as errors, opened(command, errors, subprocess.PIPE) as child:
        late = threading.Event()
        timer = threading.Timer(seconds, _kill, (child, late))
        timer.start()
        broken = ""
        try:
            broken = _unpack(child, folder)
            code = child.wait()
        finally:
            timer.cancel()
            if child.poll() is None or broken or late.is_set() or child.returncode:
                with contextlib.suppress(GrpoError):  # --rm may have done it
                    here.kubectl("delete", "pod", pod, "--ignore-not-found", "--wait=false")
        if late.is_set():
            raise DeadlineExceeded(f"results must come within {seconds:g} s, but did not; wait longer with --seconds")
        if code or broken:
            errors.seek(0)
            said = errors.read().decode(errors="replace").split("\n")
            last = clean(" ".join(line.strip() for line in said[-6:] if line.strip()))[-LONGEST:]
            raise ResultsError(
                f"pod {pod} must write the results as a tar, but ended with exit code {code}: {last or broken}; "
                "try again, or look at the claim by hand"
            )


def compare(folder: Path, run: str) -> None:
    """Against the manifest of the results where there is one. Raises ResultsError for what is missing or other."""
    store = Volume(str(folder))
    wanted: dict[str, FileRecord | None] = dict.fromkeys(NEEDED)
    adapter_alone = (folder / ADAPTED).is_file() and not (folder / POLICY).exists()
    wanted[ADAPTED if adapter_alone else MODEL] = None
    if (folder / MANIFEST).is_file():
        try:
            made = Results.model_validate_json((folder / MANIFEST).read_text())
        except (ValidationError, ValueError):
            raise ResultsError(f"{MANIFEST} of the results cannot be read; fetch them again") from None
        if made.run != run:
            raise ResultsError(
                f"the results must be those of run {run}, but are those of {clean(made.run)}; fetch again"
            )
        wanted |= {file.name: file for file in made.files}
    for name, record in wanted.items():
        found = store.record(name)
        if found is None or (record is not None and found != record):
            rule = "is missing" if found is None else f"has {found.size} bytes, other ones than were written"
            raise ResultsError(f"what came must be what the run has, but {clean(name)} {rule}; fetch them again")


def _unpack(child: "subprocess.Popen[bytes]", folder: Path) -> str:
    """Unpacks what the program writes; what is wrong with that, or ""."""
    assert child.stdin is not None and child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(b"\n")
            child.stdin.close()
        with tarfile.open(fileobj=child.stdout, mode="r|") as tar:
            tar.extractall(folder, filter="data")
        while child.stdout.read(1 << 16):
            pass
    except tarfile.TarError as error:
        return f"no whole tar ({clean(str(error))})"
    except OSError as error:
        raise DiskError(
            f"results must be written to {folder.parent}, but: {error}; make room, or give another"
        ) from error
    return ""


def _kill(child: "subprocess.Popen[bytes]", late: threading.Event) -> None:
    late.set()
    child.kill()


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside the one to make, which is gone in the end if it has not got its name."""
    scratch = Path(os.path.abspath(out)).with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise DiskError(f"{out}: its folder must be writable, but: {error}; give another") from error
    try:
        yield scratch
    except OSError as error:
        raise DiskError(f"results must be written to {out}, but: {error}; give another") from error
    finally:
        if scratch.exists():
            remove_tree(scratch)
