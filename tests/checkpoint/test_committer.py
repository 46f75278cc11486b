"""One commit at a time in a thread: what its caller sees of it, and when."""

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from grpo.checkpoint import Commit, Committer, Content
from grpo.errors import CheckpointError, DeadlineExceeded, Interrupted
from grpo.run.stopping import StopRequest
from grpo.types import FileRecord

SECONDS = 30.0


@dataclass
class Folders:
    """Commits in memory. `gate` is what a rename waits for."""

    made: list[int] = field(default_factory=list)
    renamed_at: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)

    def begin(self, step: int) -> str:
        return f"folder {step}"

    def commit(
        self,
        step: int,
        records: Sequence[FileRecord],
        state: Mapping[str, object],
        score: float | None,
        attachments: Mapping[str, bytes],
    ) -> Commit:
        assert self.gate.wait(SECONDS)
        self.renamed_at = time.monotonic()
        self.made.append(step)
        return Commit(step, 1, "", dict(state), {}, tuple(records), score)


def write(folder: str, step: int) -> tuple[FileRecord, ...]:
    return (FileRecord(folder, step, ""),)


def begin(committer: Committer, step: int, write: Callable[[str, int], Sequence[FileRecord]] = write) -> None:
    committer.begin(step, time.monotonic(), write, lambda: Content({"at": step}, 0.5, {}))


def idle() -> None:
    pass


@pytest.fixture
def folders() -> Folders:
    return Folders()


@pytest.fixture
def stop() -> StopRequest:
    return StopRequest(grace_seconds=30)


@pytest.fixture
def committer(folders: Folders, stop: StopRequest) -> Committer:
    return Committer(folders, stop, SECONDS)


def test_nothing_under_way(committer: Committer) -> None:
    assert (committer.busy, committer.ended, committer.take(), committer.finish(idle)) == (False, False, None, None)


def test_a_commit_is_made_beside_its_caller_and_told_once(folders: Folders, committer: Committer) -> None:
    began = time.monotonic()
    begin(committer, 7)
    assert committer.busy and committer.take() is None
    folders.gate.set()
    made = committer.finish(idle)
    assert made and (made.commit.step, made.commit.state, made.commit.score) == (7, {"at": 7}, 0.5)
    assert made.commit.files == (FileRecord("folder 7", 7, ""),)
    assert 0 <= made.seconds <= time.monotonic() - began and made.seconds <= folders.renamed_at - began
    assert (committer.busy, committer.ended, committer.take()) == (False, False, None)


def test_only_what_the_caller_waited_for_is_stall(folders: Folders, committer: Committer) -> None:
    committer.begin(1, time.monotonic() - 2.0, write, lambda: Content({}, None, {}))
    folders.gate.set()
    while not committer.ended:
        time.sleep(0.01)
    copied = committer._stalled
    time.sleep(0.3)
    made = committer.take()
    assert made and made.stall_seconds == copied and 2.0 <= copied <= made.seconds


def test_a_failure_is_raised_where_it_is_taken_and_once(folders: Folders, committer: Committer) -> None:
    def fails(folder: str, step: int) -> tuple[FileRecord, ...]:
        raise CheckpointError("the disk is full")

    folders.gate.set()
    begin(committer, 1, fails)
    with pytest.raises(CheckpointError, match="the disk is full"):
        committer.finish(idle)
    begin(committer, 2)
    made = committer.finish(idle)
    assert made and made.commit.step == 2 and folders.made == [2]


def test_a_bug_in_the_thread_is_no_silence(committer: Committer) -> None:
    committer.begin(1, time.monotonic(), write, lambda: Content(1 / 0, None, {}))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        committer.finish(idle)


def test_there_are_never_two(committer: Committer) -> None:
    begin(committer, 1)
    with pytest.raises(AssertionError, match="taken first"):
        begin(committer, 2)


def test_the_time_that_a_stop_needs_is_that_of_the_last_commit_and_twice_beside_one(
    folders: Folders, stop: StopRequest, committer: Committer
) -> None:
    folders.gate.set()
    committer.begin(1, time.monotonic() - 2.0, write, lambda: Content({}, None, {}))
    committer.finish(idle)
    first = stop.reserve_seconds
    assert 2.0 <= first < 2.0 + SECONDS
    folders.gate.clear()
    begin(committer, 2)
    assert stop.reserve_seconds == 2 * first
    folders.gate.set()
    committer.finish(idle)
    assert stop.reserve_seconds < first


def test_a_stop_waits_for_the_commit_under_way(folders: Folders, stop: StopRequest, committer: Committer) -> None:
    begin(committer, 1)
    stop._request(signal.SIGTERM, None)
    asked: list[int] = []

    def alive() -> None:
        asked.append(1)
        folders.gate.set()

    made = committer.finish(alive)
    assert made and made.commit.step == 1 and asked


def test_a_stop_without_time_gives_it_up_and_it_never_becomes_one(folders: Folders, committer: Committer) -> None:
    committer.stop.grace_seconds = 0.2
    writing, ended = threading.Event(), threading.Event()

    def slow(folder: str, step: int) -> tuple[FileRecord, ...]:
        assert writing.wait(SECONDS)
        ended.set()
        return ()

    folders.gate.set()
    begin(committer, 1, slow)
    committer.stop._request(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="step 1 was given up"):
        committer.finish(idle)
    writing.set()
    assert ended.wait(SECONDS)
    while committer.busy:
        time.sleep(0.01)
    assert folders.made == []


def test_a_disk_that_is_silent_ends_the_wait(folders: Folders, committer: Committer) -> None:
    committer.seconds = 0.2
    begin(committer, 4)
    with pytest.raises(
        DeadlineExceeded, match=r"committed within 0.2 s \(deadlines.save for each rank\), but step 4 is not"
    ):
        committer.finish(idle)
    folders.gate.set()


def test_ranks_and_collectors_have_deadlines_of_their_own(folders: Folders, committer: Committer) -> None:
    committer.seconds = 0.1

    def slow(folder: str, step: int) -> tuple[FileRecord, ...]:
        time.sleep(0.4)
        return ()

    folders.gate.set()
    begin(committer, 1, slow)
    assert committer.finish(idle)
