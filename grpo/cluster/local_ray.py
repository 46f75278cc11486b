"""A Ray of this run alone, on this machine: started whatever the shell says, and gone at the end with all it left."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import ray

from grpo.cluster import processes, ray_private
from grpo.cluster.private_folder import PrivateFolder
from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, Interrupted
from grpo.plan.placement import cpus_alone
from grpo.run import shell
from grpo.run.layout import LOGS
from grpo.run.stopping import StopRequest
from grpo.run.watchdog import start_watchdog

SHUTDOWN_SECONDS = 20.0  # for Ray to leave a cluster
IMPORT_SECONDS = 60.0  # for all that Ray's programs import; on a busy machine nothing is concluded
ERROR = re.compile(r"[\w.]+(Error|Exception): ")  # what follows it may have several lines
PASSING = ("MemoryError", "OSError", "BlockingIOError")  # of a machine that is full
PAUSE_SECONDS = 2.0  # before a Ray that did not come up is started again


class LocalRay:
    """Ray's processes and their folder. `folder` and `processes` are there once `start` has returned."""

    def __init__(self, config: Config, stop: StopRequest, say: Callable[[str], None] = print) -> None:
        self.config, self.stop_request, self.say = config, stop, say
        self.processes: list[psutil.Process] = []
        self._ending = contextlib.ExitStack()

    def start(self) -> None:
        """Ray with as many CPUs as the actors reserve, again and again within `deadlines.start`.

        Ray itself gives its node 30 s and no more. Raises ClusterError; ConfigError if there is no place for its
        folder or Ray's processes cannot import what they need; Interrupted.
        """
        passed = self.config.cluster.environment
        shell.forget_ray(passed)
        if ignored := shell.ignored(passed):
            self.say(f"the shell's {', '.join(ignored)}: without effect; cluster.environment lets variables through")
        # Its ports are open to every user of this machine: a token of its own, not kept in the home folder.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        own |= {"RAY_worker_niceness": "0"}  # Ray's 15 lets everything else go first
        os.environ |= own
        ray_private.read_settings()
        self.folder = self._ending.enter_context(PrivateFolder(self.config.run.dir))
        self.folder.offer(__name__)
        given = shell.environment(os.environ, passed) | own
        given |= {"PYTHONPATH": self.folder.modules, "TMPDIR": self.folder.temporary}
        given |= shell.identity(self.folder.home)
        before = set(processes_below_us())  # reward workers
        began, seconds = time.monotonic(), self.config.deadlines.start
        while error := self._try_to_start(given):
            self.stop_request.listen()  # ray.init has put handlers of its own there, also where it fails
            said = " ".join(str(error).split())
            self.processes = [process for process in processes_below_us() if process not in before]
            processes.end([process.pid for process in self.processes if process.is_running()])
            leave_ray()
            self.stop_request.check()
            if isinstance(error, SystemExit):
                raise Interrupted("stopped by SIGTERM")
            with self.stop_request.abortable():
                broken = broken_imports(given)
            if broken:
                raise ConfigError(
                    f"Ray's own processes must find all that they import, but: {broken}; install Ray and what it needs "
                    "in one environment (what PYTHONPATH names is searched behind the installed packages)"
                ) from error
            if time.monotonic() - began > seconds:
                raise ClusterError(
                    f"Ray must come up on this machine within deadlines.start = {seconds:g} s, but: {said}; the "
                    "machine may be too busy or out of memory: free it, or raise deadlines.start"
                ) from error
            self.say(f"Ray did not come up on this machine ({said[:200]}); once more")
            time.sleep(PAUSE_SECONDS)
        self.processes = [process for process in processes_below_us() if process not in before]
        for process in self.processes:
            if process.name() == "raylet":  # its agents outlive it while they wait for a head that is gone
                start_watchdog(os.getpid(), "", process.pid)

    def _try_to_start(self, environment: dict[str, str]) -> BaseException | None:
        """Why Ray did not come up; on a busy machine it gives up with a plain Exception, at SIGTERM it exits."""
        try:
            with ray_private.daemons(environment):
                ray.init(
                    address="local",
                    num_cpus=cpus_alone(self.config, os.cpu_count() or 1),
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    job_config=ray_private.OwnPath(),
                    _temp_dir=self.folder.ray,
                )
        except (Exception, SystemExit) as error:
            return error
        return None

    def end(self, failed: bool) -> None:
        """Ends what is left of its processes, and removes its folder; the logs of one that `failed` are kept."""
        processes.end([process.pid for process in self.processes if process.is_running()])
        if failed and hasattr(self, "folder"):
            with contextlib.suppress(OSError):
                keep_logs(Path(self.folder.ray), Path(self.config.run.dir, LOGS))
        self._ending.close()


def broken_imports(environment: dict[str, str]) -> str:
    """What keeps Ray's programs from starting, however long one waits, or ""; they would end without a word of it."""
    command = [sys.executable, "-c", f"import {', '.join(ray_private.PROGRAMS)}"]
    try:
        tried = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    lines = tried.stderr.strip().splitlines() or [""]
    said = next(filter(ERROR.match, reversed(lines)), lines[-1])
    lasting = tried.returncode == 1 and not said.startswith(PASSING)  # by a signal it ends otherwise
    return said if lasting else ""


def keep_logs(folder: Path, target: Path) -> None:
    """Copies the logs of Ray's session, a folder of its own for each start."""
    for logs in folder.glob("session_2*/logs"):
        shutil.copytree(logs, target / logs.parent.name, symlinks=True, dirs_exist_ok=True)


def leave_ray() -> None:
    """Leaves the cluster; every verb of Ray may wait for a head that is gone."""
    leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS)


def processes_below_us() -> list[psutil.Process]:
    """Children of this process, and theirs."""
    return psutil.Process().children(recursive=True)
