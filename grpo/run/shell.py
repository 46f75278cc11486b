"""What the shell may say: which environment variables reach the processes of a local Ray, and what it decides anyway.

What a run computes is named in its configuration. So of the shell's variables those that change how a library computes,
or which cluster is used, end at the driver; those that describe the machine (its caches, proxies, network interfaces,
which GPUs are ours) and those that nobody here knows are passed on. `cluster.environment` passes on more by name.
"""

import contextlib
import os
import pwd
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence

WITHHELD = {
    "RAY_.*|RAYLET_.*": "a local Ray is set up by the configuration alone",
    "PYTHON(?!NOUSERSITE$|USERBASE$|DONTWRITEBYTECODE$|PYCACHEPREFIX$|HOME$|UNBUFFERED$).*": "Python's modes and paths",
    "(OMP|GOMP|KMP|MKL|DNNL|ONEDNN)_.*|[A-Z]+_NUM_THREADS": "threads follow from cores and actors",
    "VLLM_(?!CACHE_ROOT$|CONFIG_ROOT$|LOGGING_LEVEL$).*": "rollout.* says how vLLM samples",
    "(PYTORCH|TORCHINDUCTOR|TORCHDYNAMO|TRITON|TORCH)_(?!.*(DIR|HOME|ARCH_LIST)$).*": "how torch computes",
    "(CUBLAS|CUDNN)_.*|NVIDIA_TF32_OVERRIDE|CUDA_LAUNCH_BLOCKING": "how a GPU computes",
    "(DS|DEEPSPEED|ACCELERATE|FSDP)_.*": "train.* says how DeepSpeed trains",
    "TRANSFORMERS_(?!OFFLINE$|CACHE$|VERBOSITY$).*|USE_(TORCH|TF|JAX|FLAX)": "which library computes",
    "(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(TORCHELASTIC|OMPI|PMI)_.*": "ranks are ours",
}
"""Patterns of names that are withheld from a local Ray, and why."""
_WITHHELD = re.compile("|".join(f"(?:{pattern})" for pattern in WITHHELD))

TOLD = {
    "CUDA_VISIBLE_DEVICES": "only these GPUs are used",
    "HF_ENDPOINT": "the hub is asked there",
    "HF_HUB_OFFLINE": "nothing is loaded from the hub",
    "TRANSFORMERS_OFFLINE": "nothing is loaded from the hub",
    "HF_DATASETS_OFFLINE": "no rows are loaded from the hub",
    "LD_PRELOAD": "it is loaded into every process",
}
"""Variables that are passed on and decide something, with what they decide."""

forgotten: set[str] = set()
"""Names of Ray's variables that this process had."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
FEWEST_FILES, MOST_FILES = 4096, 65_536
"""Open files that Ray's processes need, and that they are content with."""
LIMITS = {
    resource.RLIMIT_AS: ("ulimit -v", "addresses; torch and vLLM reserve many times what they use"),
    resource.RLIMIT_DATA: ("ulimit -d", "data"),
    resource.RLIMIT_CPU: ("ulimit -t", "seconds of CPU time; a process ends after them"),
    resource.RLIMIT_FSIZE: ("ulimit -f", "bytes of a file; a checkpoint's may be larger"),
}
"""Limits that end a run in its middle, where the shell has set them."""


def withheld(environ: Mapping[str, str], passed: Sequence[str] = ()) -> list[str]:
    """Names of the variables that a local Ray does not get; `passed` is `cluster.environment`."""
    return sorted(name for name in environ if _WITHHELD.fullmatch(name) and name not in passed)


def environment(environ: Mapping[str, str], passed: Sequence[str] = ()) -> dict[str, str]:
    """What the processes of a local Ray get: UTF-8, no proxy for this machine, nothing that is withheld."""
    kept = {name: environ[name] for name in set(environ) - set(withheld(environ, passed))}
    return kept | without_proxy(environ) | {"PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}


def module_folders() -> list[str]:
    """What PYTHONPATH names, but for the working folder: searched behind the installed packages."""
    here = os.path.realpath(".")
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [entry for entry in dict.fromkeys(named) if entry not in sys.path and os.path.realpath(entry) != here]


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """no_proxy, so that what is on this machine is never asked by way of a proxy."""
    said = [part for name in ("no_proxy", "NO_PROXY") for part in environ.get(name, "").split(",") if part.strip()]
    hosts = ",".join(dict.fromkeys([*map(str.strip, said), *LOCAL_HOSTS]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def forget_ray(passed: Sequence[str] = ()) -> None:
    """Of the driver's own variables those of Ray, which reads some when it is imported and others at its start."""
    for name in [name for name in withheld(os.environ, passed) if name.startswith("RAY_")]:
        if "ray" not in sys.modules:  # else most are its own
            forgotten.add(name)
        del os.environ[name]


def ignored(passed: Sequence[str] = ()) -> list[str]:
    """What the shell of this process says without effect on a local Ray."""
    own = {name for name in withheld(os.environ, passed) if not (name.startswith("RAY_") and "ray" in sys.modules)}
    return sorted((own | forgotten) - {"PYTHONPATH"})  # see `module_folders`


def prepare() -> None:
    """Makes this process independent of the shell, as far as that changes nothing that a user may want.

    Its files stay its own to read (umask), limits that may be raised are raised, and this machine has no proxy.
    """
    os.umask(os.umask(0o077) & 0o077)
    for limit in (resource.RLIMIT_NOFILE, *LIMITS):
        soft, hard = resource.getrlimit(limit)
        wanted = hard
        if limit == resource.RLIMIT_NOFILE:  # no more than Ray asks for: some programs go through all that there may be
            wanted = max(soft, MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES))
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (wanted, hard))
    os.environ.update(without_proxy(os.environ))


def home() -> str:
    """The user's home folder if it can be written to, else ""."""
    folder = os.path.expanduser("~")
    return folder if os.path.isabs(folder) and os.access(folder, os.W_OK | os.X_OK) else ""


def identity(folder: str) -> dict[str, str]:
    """A home in `folder` and a name where the user has none, as libraries want both (a pod with any number for a user).

    Caches that the user names (HF_HOME, XDG_CACHE_HOME) stay where they are.
    """
    found = {} if home() else {"HOME": folder}
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        found |= {"USER": os.environ.get("USER") or "grpo", "LOGNAME": os.environ.get("LOGNAME") or "grpo"}
    return found


def told(environ: Mapping[str, str]) -> list[str]:
    """The variables that are passed on and decide something, one text each."""
    return [f"{name}={environ[name]} ({TOLD[name]})" for name in TOLD if environ.get(name)]


def obstacles() -> Iterator[str]:
    """Limits of this process that will end a run; those that may be raised count as raised."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files != resource.RLIM_INFINITY and files < FEWEST_FILES:
        yield f"ulimit -n allows {files} open files, and Ray needs {FEWEST_FILES}"
    for limit, (command, what) in LIMITS.items():
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            yield f"{command} allows {hard} {what}"
