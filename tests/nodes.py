"""A Ray cluster of several nodes on this machine, started as KubeRay starts them, each with a host name of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[1]
RAY = (
    "from grpo.cluster.ray_private import binaries_alone; from ray.scripts.scripts import main\n"
    "with binaries_alone(): main()"
)
"""`ray`, whose nodes have none of the programs that nobody asks here."""
ADDRESS = "127.0.0.1"
START_SECONDS = 180.0


class Nodes:
    """`with Nodes() as nodes:` is a head without CPUs; `add` more. All are gone at the end."""

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="nodes-"))  # short: Ray's sockets are below it
        self.port = free_port()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
        self.environment = {**os.environ, **token, "RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment["PYTHONPATH"] = str(ROOT)  # the actors' classes are in `tests`
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.arguments: dict[str, tuple[str, ...]] = {}
        try:
            self._start("head", "--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard=false")
            self.wait("head")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.folder):
                    process.kill()
        for top in self.running.values():
            top.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{ADDRESS}:{self.port}"

    def add(self, name: str, role: str, cpus: int = 2) -> None:
        """A node with the label of a role; `wait` for it."""
        self._start(name, "--address", self.address, "--num-cpus", str(cpus), "--labels", f"grpo.dev/role={role}")

    def wait(self, *names: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        for name in names:
            while "runtime started" not in self.log(name):
                assert time.monotonic() < deadline, f"{name}: {self.log(name)}"
                if self.running[name].poll() is not None:  # Ray gives up early on a busy machine; a kubelet does not
                    self._start(name, *self.arguments[name])
                time.sleep(0.1)

    def kill(self, name: str) -> None:
        """The node is gone at once, with all that runs on it."""
        top = self.running.pop(name)
        family = [*psutil.Process(top.pid).children(recursive=True)]
        for process in (top, *family):
            process.kill()
        top.wait()
        psutil.wait_procs(family, timeout=10)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self, name: str, *arguments: str) -> None:
        own = ["--temp-dir", str(self.folder / name), "--node-ip-address", ADDRESS, "--dashboard-agent-listen-port=0"]
        small = ["--num-gpus=0", "--object-store-memory=80000000", "--block"]
        command = [sys.executable, "-c", RAY, "start", *arguments, *own, *small]
        self.arguments[name] = arguments
        with open(self.folder / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen(
                on_host(name, command), env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )


def on_host(name: str, command: Sequence[str]) -> list[str]:
    """The command in a namespace with this host name."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_root, "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh", *command]


def grpo(name: str, environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of grpo on a host."""
    command = on_host(name, [sys.executable, "-m", "grpo", *arguments])
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])
