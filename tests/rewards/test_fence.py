"""The fence as a whole: on older kernels, for other users, between workers, with loosened rules, and its lack."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from grpo.errors import ConfigError
from grpo.rewards import process
from grpo.rewards.pool import Call, RewardPool
from grpo.rewards.process import Failure
from grpo.rewards.registry import RewardScorer
from grpo.rewards.sandbox import landlock
from grpo.types import Prompt, Sample
from tests import hostile
from tests.reward_helpers import configured, grouped, processes_of, rewards_of, wait_until

ROOT = Path(__file__).parents[2]
needs_landlock = pytest.mark.skipif(landlock.abi() == 0, reason="the kernel lacks Landlock")

REACH = (
    "kills_its_parent disturbs_its_parent traces_its_parent reads_the_parents_memory reads_the_parents_environment "
    "touches_the_readable writes_elsewhere writes_beside_itself connects_to_a_unix_socket sends_to_a_unix_socket "
    "abstract_socket calls_what_is_denied gives_its_orphans_away enlarges_buffers allocates_without_a_page "
    "hides_from_its_keeper uses_io_uring takes_rights_away reads_a_hidden_file works_honestly"
)


@pytest.fixture
def folder(monkeypatch):
    """The user's folder, which other users can enter, with its module and secrets; nothing is left of the workers."""
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        work, scratch = Path(base, "work"), Path(base, "scratch")
        work.mkdir()
        scratch.mkdir()
        scratch.chmod(0o777)
        shutil.copy(hostile.__file__, work / "hostile.py")
        (work / ".env").write_text("canary")
        monkeypatch.chdir(work)
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        yield work
        assert wait_until(lambda: not processes_of(scratch))
        assert list(scratch.iterdir()) == []


def verdicts(names, answer, **reward_code):
    """What each function returns when it is bad, or how it fails."""
    functions = [f"hostile:{name}" for name in names.split()]
    config = configured(*functions, seconds=30, **({"workers": 1} | reward_code))
    pool = RewardPool(config, functions)
    try:
        prompt, sample = Prompt("p", "q", answer, (1,)), Sample("p", 0, (1,), (2,), (0.0,), ((0, 0),), "stop", "bad")
        outcomes = pool.run([Call(place, prompt, sample) for place in range(len(functions))], len(functions))
    finally:
        pool.close()
    return {
        name: outcome.what if isinstance(outcome, Failure) else outcome
        for name, outcome in zip(names.split(), outcomes, strict=True)
    }


def on_kernel(monkeypatch, change):
    """Workers start with another answer of the kernel."""
    changed = f"from grpo.rewards.sandbox import landlock, seccomp\n{change}\nmain()"
    monkeypatch.setattr(process, "BOOT", process.BOOT.removesuffix("main()") + changed)


@needs_landlock
@pytest.mark.parametrize("version", [1, 2, 3, 5, 6])
def test_an_older_kernel_lacks_nothing(folder, monkeypatch, version):
    on_kernel(monkeypatch, f"landlock.abi = lambda: {version}")
    assert verdicts(REACH, str(folder)) == dict.fromkeys(REACH.split(), 1.0)
    assert (folder / "hostile.py").read_text() == Path(hostile.__file__).read_text()


@needs_landlock
def test_the_fence_holds_with_network_and_readable_paths(folder):
    before = folder.stat().st_mtime_ns
    loosened = {"network": True, "readable": [str(folder)], "environment": ["HOME", "GRPO_TEST_TOKEN"]}
    told = verdicts(REACH, str(folder), **loosened)
    assert told == dict.fromkeys(REACH.split(), 1.0) | {"reads_a_hidden_file": -1.0}  # as it was named
    assert folder.stat().st_mtime_ns == before


PEER = """
import ctypes, os, signal, time
from pathlib import Path
from hostile import kept_from, libc

Path(os.environ["TMPDIR"], "mine").write_text("mine")

def attack(prompt, completion, answer):
    time.sleep(0.2)  # so that each worker gets a call
    other = next(entry for entry in answer.split() if int(entry.split(":")[0]) != os.getpid())
    pid, scratch = int(other.split(":")[0]), Path(other.split(":")[1])
    return float(sum(1 for action in (
        lambda: os.kill(pid, signal.SIGKILL),
        lambda: libc("syscall", 234, pid, pid, signal.SIGKILL),
        lambda: libc("ptrace", 16, pid, 0, 0),
        lambda: open(f"/proc/{pid}/mem", "r+b"),
        lambda: open(f"/proc/{pid}/environ"),
        lambda: os.listdir(f"/proc/{pid}/fd"),
        lambda: os.sched_setaffinity(pid, {0}),
        lambda: os.listdir(scratch),
        lambda: (scratch / "mine").read_text(),
        lambda: (scratch / "planted").touch(),
        lambda: os.unlink(scratch / "mine"),
    ) if kept_from(action) == 1.0))
"""


@needs_landlock
def test_workers_cannot_reach_each_other(folder):
    (folder / "peer.py").write_text(PEER)
    with RewardScorer(configured("peer:attack", workers=2)) as scorer:
        workers = [(worker.pid, worker.scratch) for worker in scorer.pool.workers]
        answer = " ".join(f"{pid}:{scratch}" for pid, scratch in workers)
        calls = [
            Call(0, Prompt("p", "q", answer, (1,)), Sample("p", i, (1,), (2,), (0.0,), ((0, 0),), "stop", ""))
            for i in range(4)
        ]
        assert scorer.pool.run(calls, 0) == [11.0] * 4
        assert [(worker.pid, worker.scratch) for worker in scorer.pool.workers] == workers
        assert [os.listdir(scratch) for _, scratch in workers] == [["mine"]] * 2


# ---- another user ---------------------------------------------------------------------------------------------------

SYSTEM_PYTHON = "/usr/bin/python3"
SITE = next((entry for entry in sys.path if entry.endswith("site-packages")), "")
AS_ANOTHER = """
import os, sys, tempfile
tempfile.tempdir = sys.argv[1]
from tests.rewards.test_fence import verdicts
print(os.getuid(), verdicts(sys.argv[2], os.getcwd()))
"""
CLOSED = """

@hostile
def hides_a_process(answer):
    \"\"\"A program that nobody may read cannot be looked at.\"\"\"
    program = Path(os.environ["TMPDIR"], "program")
    with open(os.open(program, os.O_CREAT | os.O_WRONLY, 0o111), "wb") as file:
        file.write(Path(shutil.which("sleep")).read_bytes())
    subprocess.run([program, "600"])


@hostile
def hides_a_folder(answer):
    os.mkdir(Path(os.environ["TMPDIR"], "closed"), 0)
    time.sleep(600)
"""
FAILS = {
    "hides_a_process": "started a process that cannot be looked at",
    "hides_a_folder": "made a folder that cannot be listed",
}


def system_python_will_do():
    """A Python of this version that other users can run, as the one of the tests may lie in a closed folder."""
    if os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON):
        return False
    check = f"import sys, pydantic; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    environment = {"PYTHONPATH": SITE}
    done = subprocess.run([SYSTEM_PYTHON, "-c", check], check=False, user=65_534, env=environment, capture_output=True)
    return done.returncode == 0


@needs_landlock
@pytest.mark.skipif(not system_python_will_do(), reason="needs root and a Python that other users can run")
def test_the_fence_holds_for_a_user_who_is_not_root(folder):
    with open(folder / "hostile.py", "a") as file:
        file.write(CLOSED)
    names = f"{REACH} makes_a_closed_folder leaves_a_process_behind {' '.join(FAILS)}"
    command = [SYSTEM_PYTHON, "-P", "-c", AS_ANOTHER, tempfile.gettempdir(), names]
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{SITE}"}
    done = subprocess.run(
        command, user=65_534, group=65_534, extra_groups=[], env=paths, capture_output=True, text=True, timeout=120
    )
    expected = dict.fromkeys(names.split(), 1.0) | FAILS
    assert done.stdout == f"65534 {expected}\n", done.stderr


# ---- a fence that is not whole --------------------------------------------------------------------------------------

LACKS = {
    "landlock": "landlock.abi = lambda: 0",
    "seccomp": "seccomp.restrict = lambda network: None",
    "proc_children": "import os; exists = os.path.exists; os.path.exists = lambda p: 'children' not in p and exists(p)",
}
NAMES = {"landlock": "Landlock .Linux 5.13", "seccomp": "seccomp with", "proc_children": ".*CONFIG_PROC_CHILDREN"}


@needs_landlock
@pytest.mark.parametrize("name", LACKS)
def test_what_is_lacking_is_refused_by_name_before_user_code_is_imported(folder, monkeypatch, name, capfd):
    on_kernel(monkeypatch, LACKS[name])
    (folder / "mine.py").write_text("print('imported')\ndef f(p, c, a): return 1.0\n")
    with pytest.raises(ConfigError, match=f"lacks {NAMES[name]}.*reward_code.isolation: none"):
        RewardScorer(configured("mine:f"))
    assert "imported" not in capfd.readouterr().err


def test_trusted_code_runs_without_a_fence_and_within_its_limits(folder, monkeypatch):
    on_kernel(monkeypatch, LACKS["landlock"])
    (folder / "mine.py").write_text(
        "import os\ndef opens(p, c, a): return float(len(open(a).read()))\n"
        "def fills(p, c, a): return len(bytearray(4 << 30))\n"
        "def leaves(p, c, a): return os.fork() and 1.0 or os.execvp('sleep', ['sleep', '600'])\n"
    )
    functions = ["mine:opens", "mine:fills", "mine:leaves"]
    with RewardScorer(configured(*functions, isolation="none", workers=1)) as scorer:
        assert scorer.isolation == ("landlock", "seccomp")
        prompt = Prompt("p", "q", str(folder / ".env"), (1,))
        calls = [Call(i, prompt, Sample("p", 0, (1,), (2,), (0.0,), ((0, 0),), "stop", "")) for i in range(3)]
        opens, fills, leaves = scorer.pool.run(calls, 3)
        assert (opens, fills.kind, leaves) == (6.0, "memory", 1.0)
        assert len(processes_of(tempfile.gettempdir())) == 2


# ---- the working folder ---------------------------------------------------------------------------------------------

SHADOW = """
try:
    open({marker!r}, "a").write(__name__)
except OSError:
    pass
raise RuntimeError("a file of the user stands for a module of Python")
"""


@needs_landlock
def test_files_beside_the_reward_replace_no_module_of_python_or_ours(folder, monkeypatch):
    marker = folder.parent / "unfenced"
    names = ["json", "statistics", "signal", "select", "socket", "ctypes", "unicodedata", "shutil", "traceback"]
    for name in names:
        (folder / f"{name}.py").write_text(SHADOW.format(marker=str(marker)))
    (folder / "grpo").mkdir()
    (folder / "grpo" / "__init__.py").write_text(SHADOW.format(marker=str(marker)))
    (folder / "pluggy.py").write_text("mine = 2.0\n")  # the name of an installed package
    source = "import statistics, random, json, pluggy\nfrom grpo.rewards.gsm8k import gsm8k\n"
    (folder / "mine.py").write_text(f"{source}def f(p, c, a): return statistics.mean([1.0, pluggy.mine])\n")
    for variable in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME"):
        monkeypatch.setenv(variable, str(folder))
    reward_code = {"environment": ["PYTHONPATH", "PYTHONSTARTUP"], "workers": 1}
    assert rewards_of(configured("mine:f", **reward_code), grouped(["a", "b"])) == [[1.5, 1.5]]
    assert not marker.exists()
    with pytest.raises(ConfigError, match="'statistics' is one of Python's own; give your file another name"):
        RewardScorer(configured("statistics:f"))


@needs_landlock
def test_modules_are_found_in_pythonpath_though_this_process_heeds_it_not(folder, monkeypatch):
    other = folder.parent / "other"
    other.mkdir()
    (other / "mine.py").write_text("def f(p, c, a): return float(len(c))\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}/missing:{os.path.relpath(other)}")
    assert str(other) not in sys.path
    assert rewards_of(configured("mine:f"), grouped(["a", "bb"])) == [[1.0, 2.0]]


@needs_landlock
def test_a_closed_file_is_named_with_the_key_that_opens_it(folder):
    (folder / "words.txt").write_text("four")
    (folder / "mine.py").write_text("def f(p, c, a): return float(len(open('words.txt').read()))\n")
    with pytest.raises(Exception, match=r"words.txt.*reward_code.readable names"):
        rewards_of(configured("mine:f", on_failure="abort"), grouped(["a", "b"]))
    assert rewards_of(configured("mine:f", readable=["words.txt"]), grouped(["a", "b"])) == [[4.0, 4.0]]


@needs_landlock
def test_what_reward_code_prints_is_marked_as_its_own(folder, capfd):
    (folder / "mine.py").write_text("def f(p, c, a): print(c); return 1.0\n")
    texts = ["\x9b2J\u202eevil", "one\rstep 7: reward 0.99\nstep 8: reward 1.00"]
    rewards_of(configured("mine:f", workers=1), grouped(texts))
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "[reward code] \\x9b2J\\u202eevil",
        "[reward code] one\\rstep 7: reward 0.99",
        "[reward code] step 8: reward 1.00",
    ]
