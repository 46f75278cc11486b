"""Memory and use of each GPU while something runs, by nvidia-smi; on a machine without one there is nothing to see."""

import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

FIELDS = "index,memory.used,memory.total,utilization.gpu"
EVERY_MS = 250
MIB = 2**20


@dataclass(frozen=True)
class Look:
    """One GPU at one time (unix seconds); bytes, and the share of the last moment in which a kernel ran."""

    time: float
    index: int
    used: int
    total: int
    busy: float


def parse(line: str, now: float) -> Look | None:
    """A line of nvidia-smi; None for one that says nothing."""
    parts = [part.strip() for part in line.split(",")]
    try:
        index, used, total, busy = (int(part) for part in parts)
    except ValueError:
        return None
    return Look(now, index, used * MIB, total * MIB, busy / 100)


class Watch:
    """Looks at all GPUs in the background, until `close`."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
            threading.Thread(target=self._read, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [self.process.pid] if self.process else []

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            look = parse(line, time.time())
            if look:
                self.looks.append(look)

    def free(self, share: float = 0.1, seconds: float = 20.0) -> None:
        """Waits until the GPUs are empty again, or so long."""
        began = time.time()
        while self.process and time.time() - began < seconds:
            time.sleep(2 * EVERY_MS / 1000)
            newest = {look.index: look for look in self.looks[-32:] if look.time > began}
            if newest and all(look.used < share * look.total for look in newest.values()):
                return

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def summary(looks: Sequence[Look], start: float, end: float) -> list[dict[str, float]]:
    """Of each GPU between two times: the most memory, all of it in GiB, and the mean use."""
    found = []
    for index in sorted({look.index for look in looks}):
        own = [look for look in looks if look.index == index and start <= look.time <= end]
        if own:
            found.append(
                {
                    "gpu": index,
                    "peak_gib": max(look.used for look in own) / 2**30,
                    "total_gib": own[0].total / 2**30,
                    "busy": sum(look.busy for look in own) / len(own),
                }
            )
    return found


def names() -> list[str]:
    """What the GPUs of this machine are called; none without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
