"""What an exception of a library means: is it this configuration, this code, a disk, or a machine that is lost?

A library says it by class, by errno or only by its words, at the top of a chain of exceptions or at its root, often in
another process. Whatever comes is looked at as a whole; what nobody has foreseen is a bug, and is not tried again.
"""

import errno
import re
import traceback
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from grpo import errors
from grpo.config.text import clean
from grpo.errors import ClusterError, GrpoError

LONGEST, END = 700, 150  # characters of a cause that are shown, and how many of these are its last ones
LONGEST_TRACE = 200_000


class Kind(StrEnum):
    """What is to blame."""

    OURS = "ours"
    """It was said by code of ours, in its own words."""
    GPU = "gpu"
    """A broken device or driver: another one helps."""
    MEMORY = "memory"
    DISK = "disk"
    LIMIT = "limit"
    """Open files or processes."""
    LAYOUT = "layout"
    """Ranks that cannot stand where they stand."""
    MODEL = "model"
    """Files of the model, or what the library makes of them."""
    BUG = "bug"
    """Of ours or of a library; also whatever nobody has foreseen."""
    CONNECTION = "connection"
    """Another process went away, or is silent."""


@dataclass(frozen=True)
class Failure:
    """An exception as it can travel between processes: plain text only."""

    kind: Kind
    text: str
    """What it says, with what caused it, on one line."""
    error: str = ""
    """Class of the GrpoError where the kind is OURS, else of the exception."""
    place: str = ""
    traceback: str = ""

    @property
    def lost(self) -> bool:
        """Whether another try may help."""
        kind = getattr(errors, self.error, None) if self.kind is Kind.OURS else None
        return self.kind in (Kind.GPU, Kind.CONNECTION) or (kind is not None and issubclass(kind, ClusterError))

    def plain(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


class ElsewhereError(Exception):
    """Carries what failed in another process, such as an engine core."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


WORDS: tuple[tuple[Kind, str], ...] = (
    (
        Kind.GPU,
        r"uncorrectable (ECC|NVLink) error|fallen off the bus|hardware stack error|CUDA driver initialization failed"
        r"|devices?(\(s\))? is/are busy or unavailable|no CUDA-capable device|system not yet initialized"
        r"|Invalid access of peer GPU memory over nvlink|Contained error|MPS (server|client)|CUDA error: unknown error",
    ),
    (
        Kind.MEMORY,
        r"out of memory|can't allocate memory|Cannot allocate memory|not enough memory|Unable to allocate"
        r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_ALLOC_FAILED|No available memory for the cache blocks"
        r"|std::bad_alloc|larger than the available KV cache|on startup is less than|MemoryError",
    ),
    (
        Kind.DISK,
        r"No space left on device|Disk quota exceeded|Read-only file system|File too large|Input/output error"
        r"|\(os error (28|122|30|13|5)\)",
    ),
    (Kind.LIMIT, r"Too many open files|can't start new thread|\(os error 24\)"),
    (Kind.LAYOUT, r"Duplicate GPU detected"),
    (
        Kind.MODEL,
        r"to save the configuration|GenerationConfig is invalid|loading state_dict|[Ss]ize mismatch"
        r"|deserializing header|does not appear to have a file named|Unrecognized (model|configuration)"
        r"|are not supported for now|unsupported architecture",
    ),
    (
        Kind.BUG,
        r"device-side assert|illegal (memory access|instruction)|misaligned address|unspecified launch failure"
        r"|ncclInvalid(Usage|Argument)",
    ),
    (
        Kind.CONNECTION,
        r"(?i)connection (was )?(likely )?(closed|reset|refused|aborted|lost|broken)|broken pipe|closed by peer"
        r"|timed out waiting|timeout caused pair closure|connectFullMesh|gloo/transport|ncclRemoteError|ncclSystemError"
        r"|unhandled system error|remote process exited|communicator was aborted|watchdog caught"
        r"|collective operation timeout|socket timeout|failed to recv|recvvalue failed|wait timeout|has timed out after"
        r"|no route to host|network is unreachable|name or service not known|temporary failure in name resolution"
        r"|couldn't connect to|max retries exceeded|read timed out|connect(ion)? timed? ?out|socketStartConnect"
        r"|socketProgress|address already in use|RPC call to .* timed out",
    ),
)
"""First match wins: a full /dev/shm comes as an NCCL system error, and every broken peer as a lost connection."""

ASIDES = (
    r"If reserved but unallocated|Try increasing `|Decrease GPU memory|To resolve: |Exception raised from \w+ at /"
    r"|Search for `cuda|CUDA kernel errors might|Compile with `TORCH"
    r"|\[type=\w+, input_value="
)
"""Where libraries begin to speak of keys that a user of ours does not have, or show their C++ stack."""

OURS = Path(__file__).parents[1]
BORDER = ("crossing", "verb", "plain_verb")  # of the actors, which every exception passes

ERRNO = {
    **dict.fromkeys((errno.ENOMEM,), Kind.MEMORY),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG), Kind.DISK),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.EAGAIN), Kind.LIMIT),
    **dict.fromkeys(
        (
            errno.EHOSTUNREACH,
            errno.ENETUNREACH,
            errno.ETIMEDOUT,
            errno.ENETDOWN,
            errno.EHOSTDOWN,
            errno.ENOTCONN,
            errno.EADDRINUSE,
        ),
        Kind.CONNECTION,
    ),
}
NAMES = {
    "OutOfMemoryError": Kind.MEMORY,  # torch's; Ray's of a node
    "ObjectStoreFullError": Kind.MEMORY,
    "OutOfDiskError": Kind.DISK,
    **dict.fromkeys(("DistError", "DistNetworkError", "DistStoreError", "DistBackendError"), Kind.CONNECTION),
    **dict.fromkeys(("gaierror", "IncompleteReadError"), Kind.CONNECTION),
    **dict.fromkeys(("ConnectError", "ReadTimeout", "ConnectTimeout", "RemoteProtocolError"), Kind.CONNECTION),
    **dict.fromkeys(("ObjectLostError", "OwnerDiedError", "NodeDiedError", "WorkerCrashedError"), Kind.CONNECTION),
    **dict.fromkeys(("ObjectFetchTimedOutError", "ActorUnavailableError", "RpcError"), Kind.CONNECTION),
}
"""Classes of libraries that this room does not import; a base counts too."""


def look(error: BaseException) -> Failure:
    """What an exception means, with all that is chained to it. What is nearest to the top and known decides."""
    chain = causes(error)
    where, trace = place_of(error), trace_of(error)
    for one in chain:
        if isinstance(one, ElsewhereError):
            return one.failure
        if isinstance(one, GrpoError):
            return Failure(Kind.OURS, str(one), type(one).__name__, where, one.traceback or trace)
    found = {kind for one in chain if (kind := kind_of(one))}
    kind = next((kind for kind in Kind if kind in found), Kind.BUG)
    return Failure(kind, told(chain), type(chain[0]).__name__, where, trace)


def causes(error: BaseException) -> list[BaseException]:
    """An exception, what it groups, and what caused it, from the top to the root; each once."""
    found: list[BaseException] = []
    left = [error]
    while left:
        one = left.pop()
        if any(one is other for other in found):
            continue
        found.append(one)
        cause = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        inner = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        left += [*([cause] if cause else []), *reversed(inner)]
    return found


def kind_of(error: BaseException) -> Kind | None:
    """Of one exception of a chain; None if it says nothing."""
    if isinstance(error, MemoryError):
        return Kind.MEMORY
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, OSError) and error.errno in ERRNO and (error.errno != errno.EACCES or error.filename):
        return ERRNO[error.errno]
    text = text_of(error)
    for kind, pattern in WORDS:
        if re.search(pattern, text):
            return kind
    if isinstance(error, ConnectionError | TimeoutError):
        return Kind.CONNECTION
    if isinstance(error, PermissionError) and error.filename:
        return Kind.DISK
    return next((kind for name, kind in NAMES.items() if name in names), None)


def told(chain: list[BaseException]) -> str:
    """All that the chain says, the top first, on one line; nothing twice."""
    parts: list[str] = []
    for error in chain:
        text = one_line(error)
        if not any(text in part for part in parts):
            parts.append(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    whole = ", because of ".join(parts)
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - END]} … {whole[-END:]}"


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks and ASIDES."""
    text = clean(" ".join(text_of(error).split()))
    return re.split(ASIDES, text)[0].strip()


def text_of(error: BaseException) -> str:
    """What it says; a class of somebody else's may fail at that."""
    try:
        return str(error)
    except Exception as broken:
        return f"(its text cannot be read: {type(broken).__name__})"


def trace_of(error: BaseException) -> str:
    """The whole traceback, for a file."""
    try:
        return "".join(traceback.format_exception(error))[-LONGEST_TRACE:]
    except Exception as broken:
        return f"no traceback can be made: {type(broken).__name__}"


def place_of(error: BaseException) -> str:
    """File, line and function: the deepest of ours, else the deepest of all."""
    frames = [frame for one in causes(error) for frame in traceback.extract_tb(one.__traceback__)]
    ours = [frame for frame in frames if OURS in Path(frame.filename).parents and frame.name not in BORDER]
    for frame in (ours or frames)[-1:]:
        return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return ""
