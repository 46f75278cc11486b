"""User rewards in worker processes: order, failures by kind and policy, deadlines, kills from outside, nothing left."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from grpo.errors import ConfigError, DeadlineExceeded, RewardError
from grpo.observe.metrics import lookup
from grpo.rewards.registry import RewardScorer
from grpo.types import Prompt
from tests.reward_helpers import configured, failed_kinds, grouped, processes_of, rewards_of, wait_until

USER_REWARDS = """
    import os, sys, time, subprocess
    def only_bad(f):
        return lambda prompt, completion, answer: f(prompt, completion, answer) if completion == "bad" else 1
    def length(prompt, completion, answer): return len(completion)
    def echo(prompt, completion, answer): return float(prompt == "q0" and answer == "#### 0")
    def keyword(completion, prompt, *, answer): return 1.0
    def two(prompt, completion): return 1.0
    @only_bad
    def raises(prompt, completion, answer): raise ValueError("no\\nluck \\x1b[31m")
    @only_bad
    def exits(prompt, completion, answer): sys.exit(3)
    @only_bad
    def dies(prompt, completion, answer): os._exit(7)
    @only_bad
    def text(prompt, completion, answer): return "1.0"
    @only_bad
    def nothing(prompt, completion, answer): return None
    @only_bad
    def nan(prompt, completion, answer): return float("nan")
    @only_bad
    def huge(prompt, completion, answer): return 10 ** 400
    def large(prompt, completion, answer): return 1e308
    def prints(prompt, completion, answer):
        print("{}" * 1000); print("{}", file=sys.__stdout__); sys.stdout.flush(); return 0.5
    def reads(prompt, completion, answer): return float(sys.stdin.read() == "")
    def hangs(prompt, completion, answer):
        if completion == "hang":
            subprocess.Popen(["sleep", "600"])
            while True: pass
        return len(completion)
    def naps(prompt, completion, answer):
        if completion == "nap":
            time.sleep(0.5)
        return len(completion)
    class Unprintable(Exception):
        def __str__(self): raise RuntimeError
    @only_bad
    def unprintable(prompt, completion, answer): raise Unprintable
    @only_bad
    def writes(prompt, completion, answer):
        for fd in range(3, 1000):
            try: os.write(fd, b"junk" * 20_000 + b"\\n" + b'{"reward": 1.0}\\n' * 9)
            except OSError: pass
        return 1.0
    @only_bad
    async def asynchronous(prompt, completion, answer): return 1.0
    def pid(prompt, completion, answer): return os.getpid()
    def sets(prompt, completion, answer): return hash("a string") % 1000 + 10 * list({"a", "b", "c"}).index("b")
    def litters(prompt, completion, answer):
        found = len(os.listdir(os.environ["TMPDIR"]))
        open(os.path.join(os.environ["TMPDIR"], "litter"), "w").close()
        os.makedirs(os.path.join(os.environ["TMPDIR"], "a/b/c"))
        return found
    def variables(prompt, completion, answer):
        assert sorted(os.environ) == ["CHOSEN", "HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR"], sorted(os.environ)
        return float(os.environ["CHOSEN"])
    not_a_function = 3
"""


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(USER_REWARDS))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "quits.py").write_text("raise SystemExit(0)")
    (tmp_path / "vanishes.py").write_text("import os\nos._exit(5)")
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)")
    (tmp_path / "json.py").write_text("raise RuntimeError('a user file must not shadow the standard library')")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield tmp_path
    assert wait_until(lambda: not processes_of(scratch))
    assert list(scratch.iterdir()) == []


def busy(folder):
    """Whether some call has started its `sleep`."""
    return [pid for pid in processes_of(folder / "scratch") if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_order_is_that_of_the_samples_whoever_answers(user_folder):
    groups = grouped(["nap", "ab", "abc", "nap"], ["a" * i for i in range(30)])
    expected = [[3.0, 2.0, 3.0, 3.0], [float(i) for i in range(30)]]
    for workers in (1, 3):
        assert rewards_of(configured("my_rewards:naps", workers=workers), groups) == expected


def test_workers_score_side_by_side_and_alike(user_folder):
    groups = grouped(["nap"] * 4, ["a", "b"])
    with RewardScorer(configured("my_rewards:naps", "my_rewards:sets", workers=4)) as scorer:
        start = time.monotonic()
        rewards_PG = [group.rewards_G for group in scorer.score(groups)]
        assert time.monotonic() - start < 1.9  # four naps of 0.5 s
    assert len(set(rewards_PG[0])) == 1 and rewards_PG[1][0] == rewards_PG[1][1]


def test_weighted_sum_of_several_rewards(user_folder):
    config = configured(("gsm8k", 1.0), ("my_rewards:length", 0.25), ("my_rewards:echo", -2.0))
    groups = grouped(["#### 0", "abcd"], ["####1", ""])
    assert rewards_of(config, groups) == [[1.0 + 1.5 - 2.0, 1.0 - 2.0], [1.0 + 1.25, 0.0]]


def test_the_same_prompt_twice_in_a_step(user_folder):
    first, second = grouped(["a", "bb"])[0], grouped(["ccc", "dddd"])[0]
    assert first.prompt.id == second.prompt.id
    assert rewards_of(configured("my_rewards:length"), [first, second]) == [[1.0, 2.0], [3.0, 4.0]]


def test_user_function_may_print_and_read(user_folder, capfd):
    assert rewards_of(configured("my_rewards:prints", "my_rewards:reads"), grouped(["a", "b"])) == [[1.5, 1.5]]
    printed = capfd.readouterr()
    assert printed.out == "" and "{}{}{}" in printed.err


def test_odd_completions_reach_the_user_function_whole(user_folder):
    texts = ["\ud800\x00\u2028\n" + "x" * 1_000_000, "y" * 300_000]
    assert rewards_of(configured("my_rewards:length"), grouped(texts)) == [[float(len(text)) for text in texts]]


def test_each_call_finds_an_empty_scratch_folder(user_folder):
    assert rewards_of(configured("my_rewards:litters", workers=1), grouped(["a", "b", "c"])) == [[0.0, 0.0, 0.0]]


def test_only_chosen_variables_are_seen(user_folder, monkeypatch):
    monkeypatch.setenv("CHOSEN", "7")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    assert rewards_of(configured("my_rewards:variables", environment=["CHOSEN"]), grouped(["a", "b"])) == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rewards:lenght", "no function 'lenght'; did you mean my_rewards:length"),
        ("my_rewards:not_a_function", "no function 'not_a_function'"),
        ("my_reward:length", "'my_reward' cannot be imported: ModuleNotFoundError.*; put my_reward.py into .* or"),
        ("broken:f", "'broken' cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("quits:f", "'quits' cannot be imported: SystemExit"),
        ("vanishes:f", r"importing vanishes:f ended the reward process \(exit code 5\); correct the module"),
        ("my_rewards:two", r"called as \(prompt, completion, answer\), but my_rewards:two\(prompt, completion\)"),
        ("my_rewards:keyword", r"but my_rewards:keyword\(completion, prompt, \*, answer\) does not"),
    ],
)
def test_unusable_reward_is_a_config_error_before_anything_starts(user_folder, function, message):
    with pytest.raises(ConfigError, match=message):
        RewardScorer(configured(function))


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("raises", "exception", "raised ValueError: no luck  [31m"),
        ("exits", "exception", "raised SystemExit: 3"),
        ("dies", "exited", "ended the reward process (exit code 7)"),
        ("text", "bad_value", "returned str"),
        ("nothing", "bad_value", "returned NoneType"),
        ("asynchronous", "bad_value", "returned coroutine"),
        ("nan", "bad_value", "returned nan"),
        ("huge", "bad_value", "returned something whose value raised OverflowError"),
        ("writes", "bad_reply", "wrote into the pipe of the reward process"),
        ("unprintable", "exception", "raised my_rewards.Unprintable: <exception str"),
    ],
)
def test_failed_reward_is_an_error_not_a_zero(user_folder, function, kind, message):
    config = configured(("gsm8k", 1.0), (f"my_rewards:{function}", 1.0), on_failure="abort", workers=1)
    expected = (
        f"reward my_rewards:{function} must return a finite number, but for prompt file:0, sample 1, it {message}"
    )
    with pytest.raises(
        RewardError, match=re.escape(expected) + rf".*; correct the function \(failed calls: {kind} 1\)"
    ):
        rewards_of(config, grouped(["fine", "bad"]))


def test_a_disturbed_pipe_leaves_no_reward_behind(user_folder):
    with RewardScorer(configured("my_rewards:writes", "my_rewards:length")) as scorer:
        with pytest.raises(RewardError, match="wrote into the pipe"):
            scorer.score(grouped(["bad"]))
        assert [group.rewards_G for group in scorer.score(grouped(["fine"]))] == [[1.0 + 4.0]]


def test_infinite_sum_is_an_error(user_folder):
    with pytest.raises(RewardError, match="weighted sum .* inf for prompt file:0, sample 0"):
        rewards_of(configured(("my_rewards:large", 2.0)), grouped(["a"]))


def test_user_rewards_may_have_any_answers(user_folder):
    with RewardScorer(configured("my_rewards:length")) as scorer:
        scorer.check_answers([Prompt("rows.jsonl:7", "q", "forty-two", (1,))])


# ---- what a failure does --------------------------------------------------------------------------------------------

FAILING = [["ok", "bad", "fine"], ["bad", "bad", "ok"], ["ok", "ok", "ok"]]


@pytest.mark.parametrize(
    ("on_failure", "kept", "dropped"),
    [
        ("drop_sample", {"file:0": [0, 2], "file:2": [0, 1, 2]}, (4, 1)),
        ("drop_group", {"file:2": [0, 1, 2]}, (6, 2)),
    ],
)
def test_failed_samples_or_groups_are_left_out_and_counted(user_folder, on_failure, kept, dropped):
    with RewardScorer(configured("my_rewards:raises", on_failure=on_failure)) as scorer:
        scored = scorer.score(grouped(*FAILING))
        assert {group.prompt.id: [s.index for s in group.samples] for group in scored} == kept
        assert all(reward == 1.0 for group in scored for reward in group.rewards_G)
        assert failed_kinds(scorer) == {"exception": 3}
        counts = scorer.failures()
        assert (counts["reward/dropped_samples"], counts["reward/dropped_groups"]) == dropped
        scorer.score(grouped(["ok", "ok"]))
        assert scorer.failures() == dict.fromkeys(counts, 0.0)
    for key in counts:
        assert lookup(key)[0].kind == "counter"


def test_more_failures_than_allowed_end_the_run_early(user_folder):
    config = configured("my_rewards:raises", max_failures=0.25, workers=1)
    with RewardScorer(config) as scorer:
        assert len(scorer.score(grouped(["ok", "bad", "ok", "ok"]))) == 1
        with pytest.raises(
            RewardError, match="max_failures = 0.25 of 8 .* 3 of the first 4 did; .*sample 0, it raised"
        ):
            scorer.score(grouped(["bad", "bad", "ok", "bad"], ["bad"] * 4))


def test_an_evaluation_with_one_sample_keeps_what_has_a_reward(user_folder):
    with RewardScorer(configured("my_rewards:raises")) as scorer:
        assert [group.prompt.id for group in scorer.score(grouped(["ok"], ["bad"], ["ok"]))] == ["file:0", "file:2"]


def test_a_step_without_any_group_left_is_an_error(user_folder):
    with pytest.raises(RewardError, match=r"none of 2 is left: reward my_rewards:dies .*\(failed calls: exited 3\)"):
        rewards_of(configured("my_rewards:dies"), grouped(["bad", "ok"], ["bad", "bad"]))


# ---- deadlines and kills --------------------------------------------------------------------------------------------


def test_the_deadline_of_a_step_kills_everything_and_the_next_scoring_works(user_folder):
    with RewardScorer(configured("my_rewards:hangs", deadline=2.0)) as scorer:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="deadlines.reward = 2 s, but my_rewards:hangs"):
            scorer.score(grouped(["ok", "hang"]))
        assert time.monotonic() - start > 1.9
        assert wait_until(lambda: not busy(user_folder))
        assert [g.rewards_G for g in scorer.score(grouped(["ok", "fine"]))] == [[2.0, 4.0]]


def test_hanging_import_is_bounded(user_folder):
    with pytest.raises(DeadlineExceeded, match="deadlines.reward = 1 s, but sleeps:f"):
        RewardScorer(configured("sleeps:f", deadline=1.0))


def test_close_ends_the_processes(user_folder):
    scorer = RewardScorer(configured("my_rewards:length"))
    assert len(processes_of(user_folder / "scratch")) == 4  # two workers, each with its supervisor
    scorer.close()
    scorer.close()
    assert processes_of(user_folder / "scratch") == []


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 1.0)])
def test_a_worker_struck_from_outside_costs_nothing(user_folder, number, seconds):
    with RewardScorer(configured("my_rewards:naps", workers=1, seconds=seconds, on_failure="abort")) as scorer:
        timer = threading.Timer(0.2, os.kill, (scorer.pool.workers[0].pid, number))
        timer.start()
        assert [g.rewards_G for g in scorer.score(grouped(["ok", "nap", "fine"]))] == [[2.0, 3.0, 4.0]]
        assert failed_kinds(scorer) == {}
        timer.join()


def test_a_killed_keeper_takes_its_worker_along_and_is_replaced(user_folder):
    with RewardScorer(configured("my_rewards:naps", workers=1)) as scorer:
        threading.Timer(0.2, os.kill, (scorer.pool.workers[0]._supervisor.pid, signal.SIGKILL)).start()
        assert [g.rewards_G for g in scorer.score(grouped(["ok", "nap", "fine"]))] == [[2.0, 3.0, 4.0]]
        assert len(processes_of(user_folder / "scratch")) == 2


def test_fault_injection_knows_the_workers(user_folder, monkeypatch):
    monkeypatch.setenv("GRPO_FAULT_DIR", str(user_folder))
    with RewardScorer(configured("my_rewards:dies")) as scorer:

        def published():
            return json.loads((user_folder / "pids.json").read_text())["reward_worker"]

        before = [worker.pid for worker in scorer.pool.workers]
        assert published() == before
        scorer.score(grouped(["ok", "ok", "bad"]))
        assert published() == [worker.pid for worker in scorer.pool.workers] != before


def test_a_module_that_works_on_beside_the_calls_is_no_failure(user_folder):
    (user_folder / "busy.py").write_text(
        "import subprocess, threading\n"
        "def work():\n    while True: subprocess.run(['true'])\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "def f(prompt, completion, answer): return len(completion)\n"
    )
    with RewardScorer(configured("busy:f", workers=1, on_failure="abort")) as scorer:
        for _ in range(2):  # its threads reap children of which the worker has just read
            assert [g.rewards_G for g in scorer.score(grouped(*10 * [["a", "bb"]]))] == 10 * [[1.0, 2.0]]


def test_workers_killed_between_steps_are_replaced(user_folder):
    with RewardScorer(configured("my_rewards:length")) as scorer:
        for worker in scorer.pool.workers:
            os.kill(worker.pid, signal.SIGKILL)
        assert [g.rewards_G for g in scorer.score(grouped(["a", "bb", "ccc"]))] == [[1.0, 2.0, 3.0]]
        assert failed_kinds(scorer) == {}


def test_an_interrupted_wait_ends_at_once(user_folder):
    def interrupt(*_):
        raise InterruptedError("stop")

    with RewardScorer(configured("my_rewards:hangs", deadline=600, workers=2)) as scorer:
        before = signal.signal(signal.SIGUSR1, interrupt)
        threading.Thread(target=lambda: wait_until(lambda: busy(user_folder)) and os.kill(os.getpid(), 10)).start()
        try:
            with pytest.raises(InterruptedError, match="stop"):
                scorer.score(grouped(["hang", "hang"]))
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert busy(user_folder) == []


def test_a_killed_parent_takes_everything_along(user_folder):
    script = textwrap.dedent("""
        import sys, tempfile
        sys.path.insert(0, sys.argv[1])
        tempfile.tempdir = sys.argv[2]
        from tests.reward_helpers import configured, grouped, rewards_of
        rewards_of(configured("my_rewards:hangs"), grouped(["hang", "hang"]))
    """)
    scratch = user_folder / "scratch"
    arguments = [sys.executable, "-P", "-c", script, str(Path(__file__).parents[2]), str(scratch)]
    parent = subprocess.Popen(arguments)
    try:
        assert wait_until(lambda: len(busy(user_folder)) == 2, 60)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not processes_of(scratch))
