"""The fences one by one: what the filter says of every call on both architectures, and what is named as missing."""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import struct
import time

import pytest

from grpo.rewards.sandbox import landlock, limits, seccomp, supervisor, usage

X86, ARM = seccomp.ARCHITECTURES["x86_64"], seccomp.ARCHITECTURES["aarch64"]
EPERM = seccomp.ERRNO | errno.EPERM
READ = (0, 63)


def verdict(code, architecture, number, *arguments):
    """What a filter returns for a call: an interpreter of the six instructions that it uses."""
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
        if operation == seccomp.AND:
            value &= operand
            continue
        holds = {
            seccomp.JUMP_EQUAL: value == operand,
            seccomp.JUMP_ANY_BIT: bool(value & operand),
            seccomp.JUMP_FROM: value >= operand,
        }[operation]
        place += if_true if holds else if_false


@pytest.mark.parametrize(("architecture", "column"), [X86, ARM])
@pytest.mark.parametrize("network", [False, True])
def test_the_filter_call_by_call(architecture, column, network):
    code = seccomp.program(architecture, column, network)
    allowed_if = {True: seccomp.ALLOW, False: EPERM}

    def says(numbers, *arguments):
        return verdict(code, architecture, numbers[column], *arguments)

    for numbers in seccomp.DENIED.values():
        assert says(numbers) == EPERM
    assert says(seccomp.CONNECT) == allowed_if[network]
    for numbers, error in seccomp.ABSENT.values():
        assert says(numbers) == seccomp.ERRNO | error
    assert says(READ) == seccomp.ALLOW
    opens = {0: True, 1: True, 0o100: True, 0o1001: True, 0o1002: True, 0o1102: True, 0o1000: False, 0o1003: False}
    for flags, allowed in opens.items():
        assert says(seccomp.OPENAT, 0, 0, flags) == allowed_if[allowed], oct(flags)
    maps = {0x22: True, 2: True, 1: True, 0x21: False, 0x23: False, 0x40022: False}
    for flags, allowed in maps.items():
        assert says(seccomp.MMAP, 0, 4096, 3, flags) == allowed_if[allowed], hex(flags)
    thread, fork, new_user, parents, own_files = 0x3D0F00, 0x01200011, 0x10000011, 0x8011, 0x3D0B00
    clones = [says(seccomp.CLONE, flags) for flags in (thread, fork, new_user, parents, own_files)]
    assert clones == [seccomp.ASK, seccomp.ASK, EPERM, EPERM, EPERM]
    assert [says(call, os.getpid(), 9) for call in (seccomp.KILL, seccomp.TGKILL)] == [seccomp.ASK] * 2
    for call in (seccomp.PRLIMIT, seccomp.AFFINITY):
        assert [says(call, pid) for pid in (0, 1)] == [seccomp.ALLOW, EPERM]
    priorities = [says(seccomp.PRIORITY, which, who) for which, who in ((0, 0), (0, 1), (1, 0), (2, 0))]
    assert priorities == [seccomp.ALLOW, EPERM, EPERM, EPERM]
    may = {seccomp.PRCTL: (15, (1, 4, 22, 35, 36)), seccomp.FCNTL: (6, (8, 10, 15, 1024, 1026, 1031))}
    for call, (good, bad) in may.items():
        arguments = [(9, option) if call is seccomp.FCNTL else (option,) for option in (good, *bad)]
        assert [says(call, *given) for given in arguments] == [seccomp.ALLOW, *[EPERM] * len(bad)]
    assert [says(seccomp.IOCTL, 0, request) for request in (0x5401, 0x8901, 0x5412)] == [seccomp.ALLOW, EPERM, EPERM]
    families = [says(seccomp.SOCKET, family, 1, 0) for family in (1, 2, 10, 16, 17, 40)]
    assert families == ([EPERM, *[seccomp.ALLOW] * 3, EPERM, EPERM] if network else [EPERM] * 6)
    assert says(seccomp.SOCKET, 16, 3, 15) == EPERM
    assert [says(seccomp.SOCKETPAIR, 1, kind) for kind in (0x80001, 2, 5)] == [seccomp.ALLOW, EPERM, EPERM]
    options = [
        says(seccomp.SETSOCKOPT, 3, level, option) for level, option in ((6, 1), (1, 9), (1, 7), (1, 33), (1, 15))
    ]
    assert options == ([seccomp.ALLOW] * 2 if network else [EPERM] * 2) + [EPERM] * 3


def test_calls_of_another_architecture_end_the_process_and_unknown_ones_do_not_exist():
    code = seccomp.program(*X86, network=True)
    assert verdict(code, ARM[0], 63) == seccomp.KILL_PROCESS
    for number in (seccomp.X32_BIT | 1, seccomp.FIRST_UNKNOWN, 2**32 - 1):
        assert verdict(code, X86[0], number) == seccomp.ERRNO | errno.ENOSYS


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


@pytest.mark.parametrize("version", [1, 2, 3, 5, 6, 7])
def test_every_version_of_landlock_holds(tmp_path, monkeypatch, version):
    if landlock.abi() < version:
        pytest.skip(f"the kernel has ABI {landlock.abi()} of Landlock")
    scratch, other = tmp_path / "scratch", tmp_path / "other"
    scratch.mkdir()
    other.mkdir()
    monkeypatch.setattr(landlock, "abi", lambda: version)

    def confined():
        landlock.restrict([], [], str(scratch))
        return tried((scratch / "file").touch), tried((other / "file").touch), tried(lambda: os.listdir(other))

    assert in_child(confined) == str(("done", "refused", "refused"))


def test_another_architecture_has_no_filter(monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    assert seccomp.restrict(network=False) is None


SECRETS = (
    *(".env", ".git/config", ".netrc", "key.pem", "secrets.yaml", "token", "data/.aws/credentials", "data/id_rsa"),
    *("package/.env", "package/deep/deeper/.ssh/id_ed25519", "package/deep/.kube/config", "package/prod.env"),
    *(".hidden/module.py", "package/.docker/config.json", "package/settings.json", "points_to_env.py"),
    *("grpo-reward-other/module.py", "package/grpo-reward-other/module.py"),
)
MODULES = ("rewards.py", "package/__init__.py", "package/deep/deeper/module.py", "data/fast.abi3.so", "linked/there.py")


def test_of_the_working_folder_only_modules_are_open_at_any_depth(tmp_path, monkeypatch):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for name in (*SECRETS, *MODULES):
        place = (elsewhere if name.startswith("linked/") else work) / name.removeprefix("linked/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if name != "points_to_env.py":
            place.touch()
    (work / "points_to_env.py").symlink_to(".env")
    (work / "linked").symlink_to(elsewhere)
    (work / "package" / "loop").symlink_to(work)
    (tmp_path / "site-packages").mkdir()
    archive = tmp_path / "archive.zip"
    archive.touch()
    folders = [work, tmp_path / "missing", tmp_path / "site-packages", archive, work / "data"]
    whole = [tmp_path / "named", work / "venv"]
    (work / "venv").mkdir()
    (work / "venv" / "spared.py").touch()
    seen = landlock.opened(map(str, folders), map(str, whole))
    expected = [work / name for name in MODULES[:-1]] + [elsewhere / "there.py", tmp_path / "site-packages", archive]
    assert sorted(set(seen)) == sorted(str(path) for path in [*expected, *whole])
    assert landlock.opened([str(work)], [str(work)]) == [str(work)]
    assert not [path for path in landlock.opened(["/"], []) if os.path.dirname(path) != "/"]
    assert "elsewhere" not in str(landlock.opened([str(tmp_path / "empty")], []))
    for number in range(9):
        (work / "data" / f"{number}.py").touch()
    for limit, most in (("MOST_ENTRIES", 3), ("MOST_MODULES", 2), ("MOST_IN_FOLDER", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(landlock, limit, most)
            seen = landlock.opened([str(work)], [])
            assert str(work / "rewards.py") in seen or limit == "MOST_ENTRIES"
            assert len([path for path in seen if "/data/" in path]) <= most


def test_limits_are_only_lowered():
    def limited():
        limits.set_limits()
        limits.limit_memory(1 << 30)
        soft_hard = [resource.getrlimit(name) for name in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]
        try:
            bytearray(2 << 30)
        except MemoryError:
            return soft_hard

    assert in_child(limited) == str([(limits.FILE_BYTES,) * 2, (1, 1)])


def keeper_of(output, tmp_path):
    return supervisor.Watch(os.getpid(), output, {"scratch": str(tmp_path), "memory_bytes": 1 << 40}, [])


def test_the_keeper_prints_a_bounded_part(tmp_path, capfd):
    reader, writer = os.pipe()
    watch = keeper_of(reader, tmp_path)
    for _ in range(5):
        os.write(writer, (b"x" * 63 + b"\n") * 512)
        assert watch.pass_on()
    watch.window = time.monotonic() - 61
    os.write(writer, b"a minute later")
    assert watch.pass_on()
    os.close(writer)
    assert not watch.pass_on()
    printed = capfd.readouterr().err.splitlines()
    assert printed[-1] == "[reward code] a minute later"
    assert set(printed[:-3]) == {"[reward code] " + "x" * 63} and "prints too much" in printed[-2]
    assert 60_000 < sum(map(len, printed)) < 67_000


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("\x1b[31mred\ttext", ["\\x1b[31mred    text"]),
        ("\x9b2J\u202egnorw\u2066\u200b", ["\\x9b2J\\u202egnorw\\u2066\\u200b"]),
        ("over\rstep 5: reward 1.00\r", ["over\\rstep 5: reward 1.00"]),
        ("a\x0bb\x0cc\x85d\u2028e\x00\x08", ["a\\x0bb\\x0cc\\x85d\\u2028e\\x00\\x08"]),
        ("x" * 50, ["x" * 40, "x" * 10]),
        ("\u6f22" * 21, ["\u6f22" * 20, "\u6f22"]),
        ("na\u00efve \u2713", ["na\u00efve \u2713"]),
        ("", [""]),
    ],
)
def test_nothing_that_is_printed_steers_a_terminal_or_looks_like_the_run(printed, shown):
    assert list(supervisor.printable_lines(printed, 40)) == shown


def test_a_terminal_that_stands_still_does_not_hold_the_keeper(tmp_path):
    def stuck():
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"x" * 4096)
        os.dup2(writer, 2)
        output, end = os.pipe()
        os.write(end, b"text\n")
        return keeper_of(output, tmp_path).pass_on(), len(os.read(reader, 65_536))

    assert in_child(stuck) == str((True, 4096))


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
        found = len(list(usage.process_tree(os.getpid())))
        usage.end_all(2**22 + 1)
        return found >= 2, len(list(usage.process_tree(os.getpid())))

    assert in_child(family) == str((True, 1))


def test_a_process_is_below_its_reaper_and_below_no_other():
    def family():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild:
                os.write(writer, str(grandchild).encode())
            time.sleep(600)
        grandchild = int(os.read(reader, 16))
        here = os.getpid()
        asked = [(child, here), (grandchild, here), (grandchild, child), (child, grandchild), (here, here), (1, here)]
        found = [usage.is_below(*pair) for pair in asked]
        usage.end_all(2**22 + 1)
        return found

    assert in_child(family) == str([True, True, True, False, False, False])
    with pytest.raises(ProcessLookupError):
        usage.is_below(2**22 + 1, os.getpid())


def test_what_is_below_the_spared_is_spared():
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        child = os.fork()
        if child:
            os.write(writer, b".")
        time.sleep(600)
    os.read(reader, 1)
    try:
        tree = dict(usage.process_tree(os.getpid()))
        assert helper in tree
        assert not {helper, *set(dict(usage.process_tree(helper)))} & set(
            dict(usage.process_tree(os.getpid(), {helper}))
        )
    finally:
        for pid in dict(usage.process_tree(helper)):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(helper, 0)


def test_a_folder_is_removed_whatever_was_made_in_it(tmp_path):
    folder, outside = tmp_path / "scratch", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (folder / "closed" / "deeper").mkdir(parents=True)
    (folder / "closed" / "deeper" / "file").touch()
    (folder / "link").symlink_to(outside)
    (folder / "odd\n\udcff").touch()
    os.mkfifo(folder / "fifo")
    (folder / "closed").chmod(0)
    assert usage.remove(str(folder))
    assert not folder.exists() and (outside / "kept").exists()
    assert usage.remove(str(folder))


def test_a_folder_is_emptied_of_all_but_what_was_there(tmp_path):
    for name in ("kept", "gone"):
        (tmp_path / name / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert usage.empty(str(tmp_path), {"kept"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"] and (tmp_path / "kept" / "below").is_dir()
    assert not usage.empty(str(tmp_path / "missing"), ())
