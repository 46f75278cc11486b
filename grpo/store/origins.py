"""Where a model or rows are fetched from: a bucket, or a repository of the hub at one commit."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpo.errors import ConfigError, GrpoError, StoreLost
from grpo.store.base import clean_name, no_space

COPIES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf")
"""Suffixes of weights in other formats, which repositories on the hub hold beside safetensors."""
_HUB = re.compile(r"hf://(datasets/)?([\w.-]+(?:/[\w.-]+)?)@([0-9a-f]{40})")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[^/?#*\\@]+)*/?")


@dataclass(frozen=True)
class Entry:
    """A file of an origin. `digest` is what the origin says of its bytes: "sha256:…", "git:…", or "" if nothing."""

    name: str
    size: int
    digest: str = ""
    version: str = ""
    """Another one means that the content has changed; "" where it cannot."""


class Origin(Protocol):
    """A folder somewhere else."""

    url: str

    def entries(self) -> list[Entry]:
        """All files but hidden ones, sorted by name. Raises ConfigError if there are none, StoreLost, DiskError."""
        ...

    def get(self, entry: Entry, folder: Path) -> None:
        """Writes the file below `folder`, under its name. Raises as `entries`."""
        ...


def open_origin(url: str) -> Origin:
    """The origin that a URL names; nothing is asked yet. Raises ConfigError."""
    if found := _HUB.fullmatch(url):
        return Hub(url, found[2], found[3], "dataset" if found[1] else "model")
    if url.startswith("hf://"):
        raise ConfigError(
            f"{url}: must be hf://owner/name@commit or hf://datasets/owner/name@commit with the commit's 40 hex digits "
            "(on the hub under Files and versions, History), as a branch or tag can move"
        )
    if not _BUCKET.fullmatch(url):  # which may hold a secret (s3://key:secret@bucket), so it is not repeated
        raise ConfigError(
            "what to fetch: must be s3://bucket/prefix in plain names, without credentials (those come from the "
            "environment), or hf://owner/name@commit"
        )
    return BucketOrigin(url.rstrip("/"))


def visible(name: str) -> bool:
    """Whether it is a file to fetch: neither hidden nor in a hidden folder."""
    return not any(part.startswith(".") for part in name.split("/"))


Opener = Callable[[str], Origin]


class Hub:
    """A repository at a commit, through the hub's own library: token, endpoint and proxies are as everywhere else."""

    def __init__(self, url: str, name: str, commit: str, kind: str) -> None:
        self.url, self.name, self.commit, self.kind = url, name, commit, kind

    def entries(self) -> list[Entry]:
        from huggingface_hub import HfApi

        with self._typed():
            info: Any = HfApi().repo_info(
                self.name, revision=self.commit, repo_type=self.kind, files_metadata=True, timeout=30
            )
        if info.sha != self.commit:
            raise ConfigError(f"{self.url}: the hub answers with commit {info.sha}; correct the commit")
        entries = [_on_hub(sibling) for sibling in info.siblings or [] if visible(sibling.rfilename)]
        if self.kind == "model" and any(entry.name.endswith(".safetensors") for entry in entries):
            entries = [entry for entry in entries if not _is_copy(entry.name, {one.name for one in entries})]
        return sorted(entries, key=lambda entry: entry.name)

    def get(self, entry: Entry, folder: Path) -> None:
        from huggingface_hub import hf_hub_download

        with self._typed():
            hf_hub_download(self.name, entry.name, revision=self.commit, repo_type=self.kind, local_dir=folder)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        import httpx
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled:
            raise ConfigError(f"{self.url}: HF_HUB_OFFLINE forbids to fetch it; unset it for this command") from None
        except errors.GatedRepoError:
            raise ConfigError(f"{self.url}: asks for a token that may read it; see secrets.huggingface") from None
        except (errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
            raise StoreLost(
                f"{self.url}: the hub must answer, but: {_line(error)}; start again once it does"
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            raise ConfigError(
                f"{self.url}: the hub has no such repository, commit or file, or shows it only with a token (HF_TOKEN, "
                "secrets.huggingface); correct it"
            ) from error
        except errors.HFValidationError as error:
            raise ConfigError(f"{self.url}: {_line(error)}; correct it") from error
        except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
            raise _lost(self.url, "the hub", error) from error


def _on_hub(sibling: Any) -> Entry:
    digest = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}" if sibling.blob_id else ""
    return Entry(clean_name(sibling.rfilename), int(sibling.size or 0), digest)


def _is_copy(name: str, all_names: set[str]) -> bool:
    """Whether it holds the weights once more; `consolidated` is Mistral's own layout."""
    consolidated = name.startswith("consolidated") and {"model.safetensors", "model.safetensors.index.json"} & all_names
    return name.endswith(COPIES) or name.startswith(("original/", "onnx/")) or bool(consolidated)


class BucketOrigin:
    """A prefix of a bucket, or one object."""

    def __init__(self, url: str) -> None:
        from grpo.store.bucket import Bucket

        self.url = url
        self._bucket = Bucket(url)

    def entries(self) -> list[Entry]:
        with self._typed():
            top = self.url.removeprefix("s3://")
            found: dict[str, dict[str, Any]] = self._bucket.fs.find(f"{self.url}/", detail=True)
            if not found and "/" in top and self._bucket.fs.exists(self.url):
                found = {top: self._bucket.fs.info(self.url)}
        names = {path: path.removeprefix(f"{top}/") if path != top else top.rpartition("/")[2] for path in found}
        entries = [
            Entry(clean_name(name), int(found[path]["size"]), version=str(found[path].get("ETag", "")))
            for path, name in sorted(names.items(), key=lambda pair: pair[1])
            if visible(name) and not path.endswith("/")
        ]
        if not entries:
            raise ConfigError(f"{self.url}: must hold files, but there are none; correct the bucket or the prefix")
        return entries

    def get(self, entry: Entry, folder: Path) -> None:
        single = self.url.endswith(f"/{entry.name}") and self._bucket.size("") is not None
        with self._typed():
            goal = folder / entry.name
            goal.parent.mkdir(parents=True, exist_ok=True)
            self._bucket.fs.get_file(self.url if single else f"{self.url}/{entry.name}", str(goal))

    @contextmanager
    def _typed(self) -> Iterator[None]:
        from botocore.exceptions import NoCredentialsError

        try:
            yield
        except (PermissionError, NoCredentialsError) as error:
            raise ConfigError(
                f"{self.url}: may not be read ({_line(error)}); give credentials (secrets.s3, a role of the pod)"
            ) from error
        except self._bucket.errors as error:
            if isinstance(error, FileNotFoundError):
                raise ConfigError(f"{self.url}: there is no such bucket or object; correct it") from error
            raise _lost(self.url, "the bucket", error) from error


def _lost(url: str, who: str, error: Exception) -> GrpoError:
    if no_space(error):
        raise error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ConfigError(f"{url}: {who} refuses it ({_line(error)}); give a token that may read it")
    return StoreLost(f"{url}: {who} must answer, but: {_line(error)}; start again once it does")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
