"""What a container says of its memory."""

import re
import subprocess
import sys
from pathlib import Path

from grpo.run.memory import host_memory, oom_kills


def test_processes_that_the_kernel_killed_are_counted_by_both_versions(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 7\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert oom_kills([str(tmp_path / "memory.events")]) == 2
    assert oom_kills([str(tmp_path / "none"), str(tmp_path / "memory.oom_control")]) == 5
    assert oom_kills([str(tmp_path / "none")]) == 0


def test_the_words() -> None:
    words = r"this process holds \d+\.\d GiB, \d+\.\d GiB are free, the limit is \d+\.\d GiB"
    assert re.fullmatch(words, host_memory())


READER = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
import psutil
from grpo.run.memory import return_freed_memory

def read(number):
    kept = []
    for size in (900_000, 5_000_000, 12_000_000):
        data = bytearray(size)
        kept.append(hashlib.sha256(data).hexdigest())
    return kept

if sys.argv[1] == "yes":
    return_freed_memory()
before = psutil.Process().memory_info().rss
for _ in range(3):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(40)))
print((psutil.Process().memory_info().rss - before) // 2**20)
"""


def test_what_threads_of_the_controller_have_freed_is_given_back() -> None:
    """As a commit reads the checkpoint back; without it some 100 MiB stay."""
    command = [sys.executable, "-c", READER, "yes"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 20
