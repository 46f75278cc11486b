"""Kinds of values that the configuration is made of: numbers with sane ends, text without control characters, paths."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

MOST_ROWS = 2**20
"""Completions of a step; all of them are held by one process."""
LONGEST_PATH, LONGEST_NAME = 1024, 255
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[^?#]*)?")


def _one_line(text: str) -> str:
    """No control, format or surrogate character: they steer terminals and logs, and no path or name needs one."""
    if not text.isprintable():
        bad = next(char for char in text if not char.isprintable())
        raise ValueError(f"must be one line of printable text, found {ascii(bad)}; remove it")
    return text


def _path(text: str) -> str:
    """Something that this machine can have as a path, or a hub id."""
    if text.startswith("~"):
        raise ValueError("must not begin with ~, which only a shell replaces; write the folder out")
    if len(text) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"must have at most {LONGEST_PATH} characters and names of at most {LONGEST_NAME} bytes")
    return text


def _inside(text: str) -> str:
    """Files are written there: a path with `..` can end up anywhere."""
    if ".." in text.split("/"):
        raise ValueError("must have no '..' in it, as files are written there; write the whole path")
    return text


def _folder(text: str) -> str:
    if "::" in text or "://" in text:
        raise ValueError("must be a folder, not a URL; only checkpoint.dir may be s3://bucket/prefix")
    return _inside(text)


def _folder_or_bucket(text: str) -> str:
    if _BUCKET.fullmatch(text) and "::" not in text:
        return _inside(text)
    if "::" in text or "://" in text:
        raise ValueError("must be a folder or s3://bucket/prefix; no other URL is written to")
    return _inside(text)


def _gpus(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("must be a whole number of GPUs or a share of one (0.01 to 1), as Ray reserves no others")
    return gpus


def _temperature(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError("must be 0 (greedy) or at least 0.01, below which vLLM samples as at 0.01")
    return temperature


def _http(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.fragment:
        raise ValueError("must be http://host… or https://host…")
    if url.username is not None or url.password is not None:
        raise ValueError("must hold no password, as configurations are shown; name a variable with the token")
    _ = url.port  # raises for one that is none
    return text


def _pattern(text: str) -> str:
    try:
        groups = re.compile(text).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression, but: {error}") from None
    if groups != 1:
        raise ValueError(f"must have one group, found {groups}; write (?:…) for groups that only hold together")
    return text


def _form(pattern: str, rule: str) -> tuple[object, ...]:
    """The pattern for the schema, the rule for a person."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {rule}")
        return text

    return Field(json_schema_extra={"pattern": f"^{pattern}$"}), AfterValidator(check)


Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Actors = Annotated[int, Field(ge=1, le=10_000)]
Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
Gibibytes = Annotated[float, Field(gt=0, le=100_000)]
Exponent = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0, le=10_000_000, description="Seconds.")]
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_temperature)]
Gpus = Annotated[float, Field(ge=0.01, le=1024), AfterValidator(_gpus)]

Line = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH), AfterValidator(_one_line)]
"""One line of printable text."""
Place = Annotated[Line, AfterValidator(_path)]
"""A path to read from, or a hub id."""
Folder = Annotated[Place, AfterValidator(_folder)]
"""A folder to write to."""
FolderOrBucket = Annotated[Place, AfterValidator(_folder_or_bucket)]
"""A folder to write to, or s3://bucket/prefix."""
HttpUrl = Annotated[Line, AfterValidator(_http)]
"""http or https, without a password."""
StopText = Annotated[str, Field(min_length=1, max_length=200)]
"""A text that ends a completion."""
Pattern = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH), AfterValidator(_pattern)]
"""A regular expression with one group."""
Commit = Annotated[str, *_form("[0-9a-f]{40}", "a commit: 40 hex digits in lower case, no branch and no tag")]
"""A commit of a hub repository."""
RunName = Annotated[
    str,
    *_form("[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", "at most 47 of a-z, 0-9 and -, with a letter or digit at both ends"),
]
"""A name that Kubernetes takes, with room for what it adds."""
Variable = Annotated[str, *_form("[A-Za-z_][A-Za-z0-9_]{0,127}", "the name of an environment variable")]
TemplateVariable = Annotated[str, *_form("[A-Za-z_][A-Za-z0-9_]{0,127}", "a name of letters, digits and _")]
"""A variable of a chat template."""
RewardName = Annotated[
    str,
    Field(max_length=255),
    *_form(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?", "a built-in reward, such as 'gsm8k', or 'module:function'"),
]
"""A built-in reward or module:function."""
LayerName = Annotated[str, *_form(r"\w{1,64}(\.\w{1,64}){0,15}", "the name of layers, such as q_proj")]
"""A name of layers in a model, or its end."""
RayLabel = Annotated[
    str,
    *_form(
        "([a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
        "a label's key as Kubernetes takes it: a name, perhaps after a domain and a slash",
    ),
]
"""Key of a Ray node label."""


def _or_auto(rule: str) -> WrapValidator:
    """One sentence where pydantic has one for each kind of value."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be auto{rule}") from None

    return WrapValidator(check)


TokensOrAuto = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=8, le=100_000_000)], _or_auto(" or a whole number from 8 to 100000000")
]
BoolOrAuto = Annotated[Literal["auto"] | bool, _or_auto(", true or false")]
