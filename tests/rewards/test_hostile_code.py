"""Hostile reward functions: each is blocked, contained or counted by its kind; its neighbours' rewards are right."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest

from grpo.rewards.gsm8k import gsm8k
from grpo.rewards.registry import RewardScorer
from grpo.rewards.sandbox import landlock
from grpo.types import Group, Prompt, Sample
from tests import hostile
from tests.reward_helpers import configured, failed_kinds, grouped, processes_of, wait_until

KINDS = {
    "exception": "raises exits interrupts recurses large_file",
    "bad_value": "nan infinite nothing text a_list huge float_raises class_lies",
    "timeout": "loops sleeps catches_everything regex stops_itself waits_for_a_lock",
    "exited": "leaves kills_itself crashes closes_everything breaks_json",
    "memory": "allocates allocates_in_children allocates_behind_a_dead_thread fills_sockets takes_many_locks",
    "processes": "fork_bomb many_threads",
    "disk": "fills_the_disk many_files deep_folders fills_the_disk_without_names maps_files_without_names "
    "hides_files_in_a_socket hides_files_behind_long_names",
    "bad_reply": "floods_the_pipe forges forges_deep_json",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
IN_PLACE = 0.0  # what patches_the_grader returns
NEEDS_A_PORT = ("connects", "a_child_connects")

pytestmark = pytest.mark.skipif(landlock.abi() == 0, reason="the kernel lacks Landlock")


@pytest.fixture(scope="module")
def surroundings():
    """(folder with the user's module and a hidden file, folder with secrets), with a canary in the environment.

    Not in pytest's folder, which other users cannot enter.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder, secrets, scratch = (Path(base, name) for name in ("code", "secrets", "scratch"))
        for path in (folder, secrets, scratch):
            path.mkdir()
        shutil.copy(hostile.__file__, folder / "hostile.py")
        (folder / ".env").write_text("canary")
        (secrets / "secret").write_text("canary")
        patch.chdir(folder)
        patch.setenv("GRPO_TEST_TOKEN", "canary")
        patch.setattr(tempfile, "tempdir", str(scratch))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(secrets / "socket"))
            listener.listen()
            yield folder, secrets
        assert wait_until(lambda: not processes_of(scratch))
        assert list(scratch.iterdir()) == []
        assert sorted(path.name for path in folder.iterdir()) == [".env", "hostile.py"]
        assert sorted(path.name for path in secrets.iterdir()) == ["secret", "socket"]


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


def asked(answer, *texts_G):
    prompt = Prompt("file:0", "q", answer, (1,))
    return [
        Group(
            prompt, tuple(Sample(prompt.id, i, (1,), (2,), (0.0,), ((0, 0),), "stop", t) for i, t in enumerate(texts_G))
        )
    ]


def test_there_are_enough_and_each_has_an_expectation():
    assert len(hostile.FUNCTIONS) > 50
    assert set(KIND_OF) <= set(hostile.FUNCTIONS)


@pytest.mark.parametrize("name", [name for name in hostile.FUNCTIONS if name not in ("forges_later",)])
def test_a_hostile_function_harms_nobody(surroundings, port, name, capfd):
    kind = KIND_OF.get(name)
    config = configured(
        f"hostile:{name}", seconds=0.4 if kind == "timeout" else 20, workers=1, memory_gib=0.5, max_failures=0.4
    )
    answer = port if name in NEEDS_A_PORT else str(surroundings[1])
    with RewardScorer(config) as scorer:
        scored = scorer.score(asked(answer, "a", "bad", "ccc"))
        assert scorer.isolation == ()
        if kind:
            assert failed_kinds(scorer) == {kind: 1}
            assert [(s.index, s.reward) for s in scored[0].samples] == [(0, 1.0), (2, 3.0)]
        else:
            assert failed_kinds(scorer) == {}
            right = 0.0 if name == "patches_the_grader" else 1.0
            assert [s.reward for s in scored[0].samples] == [1.0, right, 3.0]
        assert len(processes_of(tempfile.gettempdir())) == 2  # the worker and its supervisor
        assert scorer.score(asked(answer, "dd", "e"))[0].rewards_G == [2.0, 1.0]
    assert len(capfd.readouterr().err) < 70_000


def test_an_allowed_network_and_an_allowed_file(surroundings, port):
    folder, secrets = surroundings
    for name, answer in (
        ("connects", port),
        ("reads_a_secret", str(secrets)),
        ("connects_to_a_unix_socket", str(secrets)),
    ):
        config = configured(f"hostile:{name}", workers=1, network=True, readable=[str(secrets / "secret")])
        with RewardScorer(config) as scorer:
            reached = -1.0 if name != "connects_to_a_unix_socket" else 1.0
            assert scorer.score(asked(answer, "a", "bad"))[0].rewards_G == [1.0, reached]


def test_a_forged_reply_does_not_answer_a_later_request(surroundings):
    with RewardScorer(configured("hostile:forges_later", workers=1)) as scorer:
        assert scorer.score(grouped(["bad", "bb"]))[0].rewards_G == [1.0, 2.0]
        time.sleep(0.6)
        assert scorer.score(grouped(["ccc", "dddd"]))[0].rewards_G == [3.0, 4.0]
        assert failed_kinds(scorer) == {}


def test_the_graders_of_the_run_are_out_of_reach(surroundings):
    groups = grouped(["bad", "#### 0", "#### 1"])
    with RewardScorer(configured("gsm8k", ("hostile:patches_the_grader", 0.0), workers=1)) as scorer:
        for _ in range(2):
            assert scorer.score(groups)[0].rewards_G == [0.0, 1.0, 0.0]
    assert gsm8k("q", "#### 1", "#### 0") == 0.0


def test_an_import_that_attacks(surroundings, monkeypatch):
    folder = surroundings[0]
    attacks = ("time.sleep(600)", "os.fork() or time.sleep(600); time.sleep(600)", "fork_bomb('', 'bad', '')")
    for number, attack in enumerate(attacks):
        path = folder / f"attack{number}.py"
        path.write_text(f"import os, time\nfrom hostile import fork_bomb\n{attack}\ndef f(p, c, a): return 1.0\n")
        try:
            expected = "more than .* processes and threads" if "bomb" in attack else "deadlines.reward = 1 s"
            with pytest.raises(Exception, match=expected):
                RewardScorer(configured(f"attack{number}:f", deadline=60.0 if "bomb" in attack else 1.0))
        finally:
            path.unlink()
        assert wait_until(lambda: not processes_of(tempfile.gettempdir()))


def test_healthy_rewards_are_right_after_a_hundred_hangs(surroundings):
    """Hangs of several kinds on four workers: each costs its sample and nothing else."""
    texts_PG = [["bad" if place % 2 else "x" * (row + place) for place in range(8)] for row in range(9)]
    config = configured("hostile:loops", "hostile:sleeps", "hostile:regex", seconds=0.25, workers=4, deadline=300.0)
    with RewardScorer(config) as scorer:
        scored = scorer.score(grouped(*texts_PG))
        assert failed_kinds(scorer) == {"timeout": 9 * 4 * 3}
        assert [group.rewards_G for group in scored] == [[3.0 * (row + i) for i in (0, 2, 4, 6)] for row in range(9)]
        assert [[s.index for s in group.samples] for group in scored] == [[0, 2, 4, 6]] * 9
        assert scorer.failures()["reward/dropped_samples"] == 36
        assert scorer.failures()["reward/dropped_groups"] == 0
        assert len(processes_of(tempfile.gettempdir())) == 8
        assert all(worker.ready for worker in scorer.pool.workers)
        assert scorer.score(grouped(["a", "bb", "ccc"]))[0].rewards_G == [3.0, 6.0, 9.0]
