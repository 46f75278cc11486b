"""What stands in for an agent of Ray's: it says that nothing is served, and ends with its parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from grpo.cluster import idle_agent, ray_private

PARENT = """
import os, subprocess, sys, time
os.environ["RAY_RAYLET_PID"] = {parent}
print(subprocess.Popen(sys.argv[1:]).pid, flush=True)
time.sleep(60)
"""


def command(folder: Path) -> list[str]:
    named = [f"--session_dir={folder}", "--node_id=ab", "--dashboard_agent_command=python agent.py", "--head"]
    changed = ray_private.with_idle_agents(["raylet", *named])
    assert [*changed[:3], changed[4]] == ["raylet", *named[:2], "--head"]
    name, _, idle = changed[3].partition("=")
    assert name == "--dashboard_agent_command" and idle_agent.__file__ in idle
    return idle.split()


def started(folder: Path, parent: str) -> tuple["subprocess.Popen[str]", psutil.Process]:
    program = [sys.executable, "-c", PARENT.format(parent=parent), *command(folder)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, psutil.Process(int(process.stdout.readline()))


def test_it_says_that_nothing_is_served_and_ends_with_its_parent(tmp_path: Path) -> None:
    parent, agent = started(tmp_path, "str(os.getpid())")
    with parent:
        ports = ("metrics_agent_port_ab", "metrics_export_port_ab", "dashboard_agent_listen_port_ab")
        deadline = time.monotonic() + 30
        while not all((tmp_path / name).exists() for name in ports):
            assert agent.is_running() and time.monotonic() < deadline
            time.sleep(0.01)
        assert sorted(os.listdir(tmp_path)) == sorted(ports)
        assert {(tmp_path / name).read_text() for name in ports} == {"-1"}
        parent.kill()
    agent.wait(10)


def test_one_whose_parent_is_gone_says_nothing(tmp_path: Path) -> None:
    parent, agent = started(tmp_path, "'1'")
    with parent:
        deadline = time.monotonic() + 30
        while agent.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.listdir(tmp_path) == []
        parent.kill()


def test_other_commands_stay_as_they_are() -> None:
    assert ray_private.with_idle_agents(["gcs_server", "--log_dir=x"]) == ["gcs_server", "--log_dir=x"]


def test_the_ports_have_the_names_that_ray_waits_for() -> None:
    from ray import _raylet

    names = {getattr(_raylet, name) for name in dir(_raylet) if name.endswith("_PORT_NAME")}
    assert {port for ports in ray_private.AGENTS.values() for port in ports} == names - {"gcs_server_port"}
