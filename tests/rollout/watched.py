"""What is looked at from outside when an engine ends."""

from pathlib import Path

import psutil


def watchdogs(folder: Path) -> list[psutil.Process]:
    """The watchdog of the engine whose sockets are in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-1:] == [str(folder)] and "-I" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert len(gone) == len(processes) and not alive
