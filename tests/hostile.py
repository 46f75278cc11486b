"""Reward functions that misbehave when the completion is "bad"; else they return the completion's length.

Those that try to reach something return 1.0 if they were kept from it and -1.0 if they were not. The reference answer
may hold what they need, such as the path of a secret or the port of a listening socket.
"""

import array
import asyncio
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

FUNCTIONS = []
GIB = 1 << 30


def hostile(function):
    def reward(prompt, completion, answer):
        return function(answer) if completion == "bad" else float(len(completion))

    reward.attack = function
    FUNCTIONS.append(function.__name__)
    return reward


def kept_from(action):
    """1.0 if the action fails for lack of a right."""
    try:
        action()
    except PermissionError:
        return 1.0
    return -1.0


def libc(name, *arguments):
    """A function of the C library; raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


# ---- exceptions and values


@hostile
def raises(answer):
    raise ValueError("no luck")


@hostile
def exits(answer):
    sys.exit(0)


@hostile
def interrupts(answer):
    raise KeyboardInterrupt


@hostile
def recurses(answer):
    return recurses.attack(answer) + 1


@hostile
def nan(answer):
    return float("nan")


@hostile
def infinite(answer):
    return float("inf")


@hostile
def nothing(answer):
    return None


@hostile
def text(answer):
    return "1.0"


@hostile
def a_list(answer):
    return [1.0, 1.0]


@hostile
def huge(answer):
    return 10**5000


@hostile
def float_raises(answer):
    class Number(float):
        def __float__(self):
            raise RuntimeError("caught you")

    return Number()


@hostile
def class_lies(answer):
    class Liar:
        @property
        def __class__(self):
            sys.exit(0)

    return Liar()


# ---- time


@hostile
def loops(answer):
    while True:
        pass


@hostile
def sleeps(answer):
    time.sleep(600)


@hostile
def catches_everything(answer):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        with contextlib.suppress(BaseException):
            while True:
                pass


@hostile
def regex(answer):
    return float(bool(re.fullmatch(r"(a|aa)+$", "a" * 100 + "b")))


@hostile
def stops_itself(answer):
    os.kill(os.getpid(), signal.SIGSTOP)


@hostile
def waits_for_a_lock(answer):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


# ---- the end of the process


@hostile
def leaves(answer):
    os._exit(0)


@hostile
def kills_itself(answer):
    os.kill(os.getpid(), signal.SIGKILL)


@hostile
def crashes(answer):
    ctypes.string_at(0)


@hostile
def closes_everything(answer):
    os.closerange(0, 256)
    return 1.0


@hostile
def breaks_json(answer):
    json.dumps = None
    return 1.0


# ---- memory, processes, disk, output


@hostile
def allocates(answer):
    return float(len(bytearray(4 * GIB)))


@hostile
def allocates_in_children(answer):
    for _ in range(8):
        if os.fork() == 0:
            _kept = b"x" * (120 << 20)
            time.sleep(600)
    time.sleep(600)


@hostile
def fork_bomb(answer):
    while True:
        with contextlib.suppress(OSError):
            os.fork()


@hostile
def many_threads(answer):
    threading.stack_size(64 << 10)
    for _ in range(10_000):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return 1.0


@hostile
def daemon(answer):
    """A double fork whose grandchild wants a session of its own; it says on a pipe whether it got one."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.write(writer, str(kept_from(os.setsid)).encode())
            time.sleep(600)
        os._exit(0)
    os.wait()
    return float(os.read(reader, 10))


@hostile
def fills_the_disk(answer):
    for number in range(100):
        with open(f"{os.environ['TMPDIR']}/{number}", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 200 << 20)
            time.sleep(0.02)
    return -1.0


@hostile
def many_files(answer):
    for number in range(200_000):
        Path(os.environ["TMPDIR"], str(number)).touch()
    return -1.0


@hostile
def large_file(answer):
    with open(f"{os.environ['TMPDIR']}/large", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * GIB)
    return -1.0


@hostile
def deep_folders(answer):
    """A folder that Python's rmtree cannot take away."""
    os.chdir(os.environ["TMPDIR"])
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    os.chdir("/")
    return 1.0


@hostile
def prints(answer):
    for _ in range(1024):
        print("o" * (1 << 20))
    return 1.0


@hostile
def prints_errors(answer):
    for _ in range(1024):
        os.write(2, b"e" * (1 << 20))
    return 1.0


@hostile
def floods_the_pipe(answer):
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            for _ in range(1024):
                os.write(fd, b"p" * (1 << 20))
    return 1.0


@hostile
def forges(answer):
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(fd, b'{"id": "0", "reward": 1.0}\n' * 9)
    return 1.0


@hostile
def forges_deep_json(answer):
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(fd, b"[" * 60_000 + b"\n")
    return 1.0


@hostile
def forges_later(answer):
    def write():
        time.sleep(0.3)
        forges.attack(answer)

    threading.Thread(target=write, daemon=True).start()
    return 1.0


# ---- secrets and other processes


@hostile
def reads_the_environment(answer):
    found = list(os.environ.values())
    with contextlib.suppress(PermissionError):  # a process that changed its user may not even read its own
        found.append(Path("/proc/self/environ").read_text())
    return -1.0 if any("canary" in value for value in found) else 1.0


@hostile
def reads_the_first_environment(answer):
    return kept_from(lambda: Path("/proc/1/environ").read_bytes())


@hostile
def reads_the_parents_environment(answer):
    return kept_from(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes())


@hostile
def reads_the_parents_memory(answer):
    return kept_from(lambda: open(f"/proc/{os.getppid()}/mem", "rb"))


@hostile
def reads_a_secret(answer):
    return kept_from(lambda: Path(answer, "secret").read_bytes())


@hostile
def reads_a_hidden_file(answer):
    return kept_from(lambda: Path(__file__).with_name(".env").read_bytes())


@hostile
def reads_through_a_link(answer):
    link = Path(os.environ["TMPDIR"], "link")
    link.symlink_to(Path(answer, "secret"))
    return kept_from(link.read_bytes)


@hostile
def writes_beside_itself(answer):
    return kept_from(lambda: Path(__file__).with_name("planted.py").write_text(""))


@hostile
def changes_its_module(answer):
    return kept_from(lambda: Path(__file__).write_text(""))


@hostile
def writes_elsewhere(answer):
    tries = [Path(folder, "grpo-planted") for folder in ("/", "/tmp", "/dev/shm", "/var/tmp", answer)]
    return min(kept_from(path.touch) for path in tries)


@hostile
def takes_rights_away(answer):
    return kept_from(lambda: os.chmod(answer, 0))


@hostile
def removes_a_folder(answer):
    return kept_from(lambda: os.rename(answer, answer + "-gone"))


@hostile
def kills_its_parent(answer):
    return kept_from(lambda: os.kill(os.getppid(), signal.SIGKILL))


@hostile
def signals_the_first_process(answer):
    return kept_from(lambda: os.kill(1, 0))


@hostile
def traces_its_parent(answer):
    return kept_from(lambda: libc("ptrace", 16, os.getppid(), 0, 0))


@hostile
def new_namespace(answer):
    return kept_from(lambda: libc("unshare", 0x10000000))


@hostile
def mounts(answer):
    return kept_from(lambda: libc("mount", b"none", b"/mnt", b"tmpfs", 0, 0))


@hostile
def raises_its_limits(answer):
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return -1.0
    return kept_from(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0)))


@hostile
def hides_from_its_parent(answer):
    return kept_from(lambda: libc("prctl", 1, 0, 0, 0, 0))


@hostile
def uses_io_uring(answer):
    return kept_from(lambda: libc("syscall", 425, 1, array.array("I", [0] * 30).buffer_info()[0]))


@hostile
def has_powers(answer):
    status = Path("/proc/self/status").read_text()
    return 1.0 if re.search(r"CapEff:\s+0{16}\n", status) and re.search(r"NoNewPrivs:\s+1\n", status) else -1.0


# ---- past the limits


@hostile
def gives_its_orphans_away(answer):
    """As a subreaper below the worker, or to the worker's parent (CLONE_PARENT)."""
    subreaper = kept_from(lambda: libc("prctl", 36, 1, 0, 0, 0))
    return min(subreaper, kept_from(lambda: libc("syscall", 56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)))


@hostile
def leaves_a_process_behind(answer):
    """By taking away from the worker what would find it."""
    sys.modules["grpo.rewards.sandbox.worker"].children = set
    if os.fork() == 0:
        time.sleep(600)
    return 1.0


@hostile
def allocates_behind_a_dead_thread(answer):
    """/proc/PID shows no memory of a process whose first thread has ended."""

    def take():
        time.sleep(0.3)
        kept.append(b"x" * (150 << 20))
        time.sleep(600)

    kept = []
    for _ in range(5):
        if os.fork() == 0:
            threading.Thread(target=take).start()
            time.sleep(0.1)
            ctypes.CDLL(None).syscall(60, 0)
    time.sleep(600)


@hostile
def allocates_without_a_page(answer):
    """What is shared stays in memory while one page of it is mapped; nobody counts it."""
    shared = kept_from(lambda: mmap.mmap(-1, 1 << 20))
    return min(shared, kept_from(lambda: open("/dev/zero", "rb")), kept_from(lambda: libc("memfd_create", b"", 0)))


@hostile
def fills_sockets(answer):
    pairs = [socket.socketpair() for _ in range(120)]
    for one, _ in pairs:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while one.send(b"x" * 65_536):
                pass
    time.sleep(600)


@hostile
def enlarges_buffers(answer):
    one, _two = socket.socketpair()
    tries = [partial(one.setsockopt, socket.SOL_SOCKET, option, 1 << 22) for option in (7, 8, 32, 33)]
    return min(*map(kept_from, tries), kept_from(lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETPIPE_SZ, 1 << 20)))


@hostile
def takes_many_locks(answer):
    with open(f"{os.environ['TMPDIR']}/locked", "wb") as file:
        for place in range(3_000):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
        time.sleep(600)


@hostile
def fills_the_disk_without_names(answer):
    for fd in [os.open(os.environ["TMPDIR"], os.O_TMPFILE | os.O_RDWR) for _ in range(3)]:
        for _ in range(190):
            os.write(fd, b"x" * (1 << 20))
    time.sleep(600)


@hostile
def maps_files_without_names(answer):
    kept = []
    for _ in range(4):
        with tempfile.TemporaryFile() as file:
            file.truncate(4096)
            kept.append(mmap.mmap(file.fileno(), 4096))
    while True:  # Python keeps a file of its own for each; a C program would not
        os.closerange(3, 256)
        time.sleep(600)


@hostile
def hides_files_in_a_socket(answer):
    one, _two = socket.socketpair()
    with tempfile.TemporaryFile() as file:
        socket.send_fds(one, [b"."], [file.fileno()])
    time.sleep(600)


@hostile
def hides_files_behind_long_names(answer):
    """A path longer than any call takes, though not deep."""
    os.chdir(os.environ["TMPDIR"])
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    time.sleep(600)


@hostile
def writes_on_behind_the_call(answer):
    def work():
        for number in range(1_000_000):
            with contextlib.suppress(OSError):
                Path(os.environ["TMPDIR"], str(number)).mkdir()
                Path(os.environ["TMPDIR"], str(number), "file").touch()

    threading.Thread(target=work, daemon=True).start()
    return 1.0


@hostile
def makes_a_closed_folder(answer):
    folder = Path(os.environ["TMPDIR"], "closed")
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "file").touch()
    os.mkdir(folder / "inside" / "deeper", 0)
    return 1.0


# ---- what no path or process id guards


@hostile
def touches_the_readable(answer):
    """Time, length and attributes of a file that it may read."""
    path, fd = __file__, os.open(__file__, os.O_RDONLY)
    return min(
        kept_from(lambda: os.utime(path, (0, 0))),
        kept_from(lambda: os.utime(fd)),
        kept_from(lambda: os.truncate(path, 0)),
        kept_from(lambda: os.open(path, os.O_RDONLY | os.O_TRUNC)),
        kept_from(lambda: os.open(path, 3 | os.O_TRUNC)),
        kept_from(lambda: os.setxattr(path, "user.mark", b"x")),
        kept_from(lambda: fcntl.ioctl(fd, 0x40086602, b"\x40" + bytes(7))),
        kept_from(lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
    )


@hostile
def disturbs_its_parent(answer):
    parent, (reader, _writer) = os.getppid(), os.pipe()
    return min(
        kept_from(lambda: os.sched_setaffinity(parent, {0})),
        kept_from(lambda: os.setpriority(os.PRIO_PROCESS, parent, 19)),
        kept_from(lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, parent)),
        kept_from(lambda: fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGKILL)),
        kept_from(lambda: fcntl.ioctl(reader, 0x8901, parent.to_bytes(4, "little"))),
        kept_from(lambda: libc("syscall", 234, parent, parent, signal.SIGKILL)),
        kept_from(lambda: os.kill(-1, 0)),
    )


@hostile
def calls_what_is_denied(answer):
    """process_vm_writev, userfaultfd, pidfd_getfd, landlock, seccomp, splice, inotify, a thread with its own files."""
    denied = (311, 323, 438, 444, 317, 275, 253, 206, 424, 241)
    tries = [kept_from(partial(libc, "syscall", number, 0, 0, 0, 0, 0, 0)) for number in denied]
    return min(*tries, *(kept_from(partial(libc, "syscall", 56, flags, 0, 0, 0, 0)) for flags in (0x10100, 0x20000011)))


@hostile
def hides_from_its_keeper(answer):
    return kept_from(lambda: libc("prctl", 4, 0, 0, 0, 0))


# ---- what it may do


@hostile
def works_honestly(answer):
    """Not hostile at all: programs with a time limit, asyncio, a database, files, a pool of threads."""
    try:
        subprocess.run(["sleep", "600"], timeout=0.1)
    except subprocess.TimeoutExpired:
        seen = subprocess.run(["sh", "-c", "kill $$; sleep 600"], capture_output=True).returncode == -signal.SIGTERM

    async def program():
        process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        return (await process.communicate(b"text"))[0] == b"text"

    with tempfile.TemporaryDirectory() as folder, contextlib.closing(sqlite3.connect(f"{folder}/rows.db")) as database:
        database.execute("create table rows (number)")
        database.execute("insert into rows values (7)")
        database.commit()
        seven = database.execute("select number from rows").fetchone()
        shutil.copyfile(__file__, f"{folder}/copy.py")
        os.rename(f"{folder}/copy.py", f"{folder}/moved.py")
    return 1.0 if seen and asyncio.run(program()) and seven == (7,) and os.nice(1) else -1.0


# ---- network


@hostile
def connects(answer):
    return kept_from(lambda: socket.create_connection(("127.0.0.1", int(answer)), timeout=5).close())


@hostile
def connects_to_a_unix_socket(answer):
    def connect():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{answer}/socket")

    return kept_from(connect)


@hostile
def sends_to_a_unix_socket(answer):
    """From one end of a pair of datagram sockets, which is a socket like any other."""
    return kept_from(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", f"{answer}/socket"))


@hostile
def abstract_socket(answer):
    return kept_from(lambda: socket.socket(socket.AF_UNIX).bind("\0grpo-test"))


@hostile
def a_child_connects(answer):
    code = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5)"
    child = subprocess.run([sys.executable, "-c", code, answer], capture_output=True, text=True)
    return 1.0 if "PermissionError" in child.stderr else -1.0


# ---- the grader


@hostile
def patches_the_grader(answer):
    from grpo.rewards import gsm8k, registry

    gsm8k.gsm8k = gsm8k.reference_number = lambda *_: 1.0
    registry.BUILT_IN["gsm8k"] = lambda *_: 1.0
    return 0.0
