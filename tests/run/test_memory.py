"""What a container says of its memory."""

from pathlib import Path

from grpo.run.memory import host_memory, oom_kills


def test_processes_that_the_kernel_killed_are_counted_by_both_versions(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 7\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert oom_kills([str(tmp_path / "memory.events")]) == 2
    assert oom_kills([str(tmp_path / "none"), str(tmp_path / "memory.oom_control")]) == 5
    assert oom_kills([str(tmp_path / "none")]) == 0


def test_the_words() -> None:
    assert "this process holds 0." in host_memory() and host_memory().endswith(" GiB")
