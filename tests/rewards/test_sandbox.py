"""The fences one by one: what the filter says of every call on both architectures, and what is named as missing."""

import ctypes
import errno
import os
import resource
import struct
import time

import pytest

from grpo.rewards.sandbox import landlock, limits, seccomp, supervisor

X86, ARM = seccomp.ARCHITECTURES["x86_64"], seccomp.ARCHITECTURES["aarch64"]
EPERM = seccomp.ERRNO | errno.EPERM
OPENAT, READ = (257, 56), (0, 63)


def verdict(code, architecture, number, *arguments):
    """What a filter returns for a call: an interpreter of the five instructions that it uses."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    place = value = 0
    while True:
        operation, if_true, if_false, operand = struct.unpack("HBBI", code[place])
        place += 1
        if operation == seccomp.RETURN:
            return operand
        if operation == seccomp.LOAD:
            value = struct.unpack_from("I", data, operand)[0]
            continue
        holds = {
            seccomp.JUMP_EQUAL: value == operand,
            seccomp.JUMP_ANY_BIT: bool(value & operand),
            seccomp.JUMP_ABOVE: value >= operand,
        }[operation]
        place += if_true if holds else if_false


@pytest.mark.parametrize(("architecture", "column"), [X86, ARM])
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("shared_user", [False, True])
def test_the_filter_call_by_call(architecture, column, network, shared_user):
    code = seccomp.program(architecture, column, network, shared_user, shared_user)

    def says(numbers, *arguments):
        return verdict(code, architecture, numbers[column], *arguments)

    for numbers in seccomp.DENIED.values():
        assert says(numbers) == EPERM
    for numbers in (*seccomp.RIGHTS_OF_FILES.values(), *seccomp.SIGNALS.values()):
        assert says(numbers) == (EPERM if shared_user else seccomp.ALLOW)
    for numbers in (OPENAT, READ, (seccomp.CLONE[0], seccomp.CLONE[1])):
        assert says(numbers) == seccomp.ALLOW
    assert says(seccomp.CLONE, 0x01200011) == seccomp.ALLOW  # fork of the C library
    assert says(seccomp.CLONE, 0x10000000 | 17) == EPERM  # CLONE_NEWUSER
    assert says(seccomp.CLONE3) == seccomp.ERRNO | errno.ENOSYS
    assert [says(seccomp.PRLIMIT, pid) for pid in (0, 1)] == [seccomp.ALLOW, EPERM]
    assert [says(seccomp.PRCTL, option) for option in (1, 15)] == [EPERM, seccomp.ALLOW]
    families = [says(seccomp.SOCKET, family) for family in (1, 2, 10, 16, 17, 40)]
    assert families == ([EPERM, *[seccomp.ALLOW] * 3, EPERM, EPERM] if network else [EPERM] * 6)
    for call in (seccomp.KILL, seccomp.TGKILL):
        assert says(call, os.getpid(), 9) == seccomp.ALLOW
        for other in (1, 0, 2**32 - 1):
            assert says(call, other, 9) == (EPERM if shared_user else seccomp.ALLOW)


def test_calls_of_another_architecture_end_the_process():
    code = seccomp.program(*X86, network=True, own_files=False, own_signals=False)
    assert verdict(code, ARM[0], 63) == seccomp.KILL_PROCESS
    assert verdict(code, X86[0], seccomp.X32_BIT | 1) == EPERM


def test_no_call_is_denied_twice():
    for column in (0, 1):
        numbers = [pair[column] for pair in (*seccomp.DENIED.values(), *seccomp.SIGNALS.values())]
        assert len(set(numbers)) == len(numbers)


def in_child(action):
    """Runs the action in a fork; what it returns, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(action()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def tried(action):
    try:
        action()
    except PermissionError:
        return "refused"
    return "done"


@pytest.mark.parametrize(
    ("version", "network", "missing"),
    [
        (0, False, ("landlock", "landlock_network", "landlock_signals")),
        (1, False, ("landlock_network", "landlock_signals")),
        (3, True, ("landlock_signals",)),
        (4, False, ("landlock_signals",)),
        (6, False, ()),
    ],
)
def test_what_the_kernel_lacks_is_named_and_the_rest_holds(tmp_path, monkeypatch, version, network, missing):
    if landlock.abi() < version:
        pytest.skip(f"the kernel has ABI {landlock.abi()} of Landlock")
    scratch, other = tmp_path / "scratch", tmp_path / "other"
    scratch.mkdir()
    other.mkdir()
    monkeypatch.setattr(landlock, "abi", lambda: version)

    def confined():
        named = landlock.restrict([], [], str(scratch), network)
        return named, tried((scratch / "file").touch), tried((other / "file").touch), tried(lambda: os.listdir(other))

    fences = "refused" if version else "done"
    assert in_child(confined) == str((missing, "done", fences, fences))


def test_without_landlock_the_filter_keeps_signals_inside():
    parent = os.getpid()

    def confined():
        ctypes.CDLL(None).prctl(landlock.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        named = seccomp.restrict(network=False, own_files=True, own_signals=True)
        return named, tried(lambda: os.kill(os.getpid(), 0)), tried(lambda: os.kill(parent, 0))

    assert in_child(confined) == str(((), "done", "refused"))


def test_another_architecture_has_no_filter(monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    assert seccomp.restrict(network=False, own_files=False, own_signals=False) == ("seccomp",)


def test_hidden_files_and_the_root_folder_stay_out_of_sight(tmp_path):
    for name in (".env", ".git", "rewards.py"):
        (tmp_path / name).touch()
    (tmp_path / "package").mkdir()
    archive = tmp_path / "archive.zip"
    archive.touch()
    seen = landlock.visible([str(tmp_path), "/", str(tmp_path / "missing"), str(archive)])
    assert sorted(set(seen)) == sorted(str(tmp_path / name) for name in ("archive.zip", "package", "rewards.py"))


def test_limits_are_only_lowered():
    def limited():
        limits.set_limits(own_user=True)
        limits.limit_memory(1 << 30)
        limits.allow_cpu(1.0)
        soft_hard = [resource.getrlimit(name) for name in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]
        try:
            bytearray(2 << 30)
        except MemoryError:
            return soft_hard, resource.getrlimit(resource.RLIMIT_CPU)[0] < 60

    assert in_child(limited) == str(([(limits.FILE_BYTES,) * 2, (0, 0)], True))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_taken_only_if_it_can_read_what_it_needs(tmp_path):
    scratch, closed = tmp_path / "scratch", tmp_path / "closed"
    for path in (scratch, closed):
        path.mkdir(mode=0o700)
    os.chown(scratch, 65_534, 65_534)
    reachable = os.stat(tmp_path.parent.parent).st_mode & 0o001
    assert limits.can_become(65_534, [str(closed)], str(scratch)) is False
    assert limits.can_become(65_534, ["/usr"], str(scratch)) is bool(reachable)
    assert limits.can_become(65_534, ["/usr"], str(closed)) is False


def test_the_keeper_prints_a_bounded_part_without_control_characters(tmp_path, capfd):
    reader, writer = os.pipe()
    watch = supervisor.Watch(os.getpid(), reader, {"scratch": str(tmp_path), "memory_bytes": 1 << 40}, [])
    os.write(writer, b"\x1b[31mred\ttext\r\n")
    assert watch.pass_on()
    for _ in range(4):
        os.write(writer, b"x" * 32_768)
        assert watch.pass_on()
    watch.window = time.monotonic() - 61
    os.write(writer, b"a minute later\n")
    assert watch.pass_on()
    os.close(writer)
    assert not watch.pass_on()
    printed = capfd.readouterr().err
    assert printed.startswith("[31mred\ttext\n") and printed.endswith("a minute later\n")
    assert printed.count("prints too much") == 1 and 60_000 < len(printed) < 66_000


def test_the_keeper_finds_orphans_of_orphans():
    def family():
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # subreaper
        reader, writer = os.pipe()
        if os.fork() == 0:
            for _ in range(3):
                if os.fork():
                    os._exit(0)
            os.setsid()
            os.write(writer, b".")
            time.sleep(600)
        os.read(reader, 1)
        found = len(list(supervisor.process_tree(os.getpid())))
        supervisor.end_all(2**22 + 1)
        return found >= 2, len(list(supervisor.process_tree(os.getpid())))

    assert in_child(family) == str((True, 1))
