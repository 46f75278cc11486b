"""What is done on the node of a process."""

import subprocess
import time

import psutil

from grpo.cluster import processes


def test_stacks_of_a_process_that_is_stopped() -> None:
    program = "import time\ndef asleep():\n print(flush=True)\n time.sleep(600)\nasleep()"
    process = subprocess.Popen(["python3", "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        psutil.Process(process.pid).suspend()
        assert "asleep" in processes.stacks([process.pid])
        assert "no stacks" in processes.stacks([2**22 - 1])
    finally:
        process.kill()
        process.wait()


def test_ending_takes_children_and_stopped_ones_along() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"])
    found = psutil.Process(parent.pid)
    while len(found.children()) < 2:
        time.sleep(0.01)
    tree = [found, *found.children()]
    found.suspend()
    assert processes.end([parent.pid, 2**22 - 1]) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in tree)
