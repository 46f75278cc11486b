"""Strangers who reach the port of a transfer: with it alone nobody joins, reads, takes a place or holds anybody up."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import ClusterError
from grpo.interfaces.workers import Transfer
from grpo.weights import group, rendezvous
from grpo.weights.process_group import GroupTransport
from grpo.weights.rendezvous import MOST_STRANGERS, NONCE, PLACE, PROOF, Gate, Member, join, prove
from grpo.weights.shared_store import SharedStore
from tests.ranks import free_port
from tests.weights.test_process_group import within

SECRET = "5e" * 32
TENSORS = [("w", torch.arange(1000.0))]


def opened(port: int, rank: int, size: int, secret: str = SECRET, seconds: float = 20) -> GroupTransport:
    return GroupTransport("gloo", "cpu", "127.0.0.1", port, rank, size, secret, seconds)


def connected(port: int) -> socket.socket:
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


@contextmanager
def sender(port: int, size: int = 2, seconds: float = 20) -> Iterator[Future[GroupTransport]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(opened, port, 0, size, SECRET, seconds)


def finish(first: Future[GroupTransport], port: int) -> None:
    """The true member comes, and the weights reach it."""
    member = opened(port, 1, 2)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(lambda: [tensor for _, tensor in member.receive()])
        first.result(20).send(1, TENSORS)
        assert torch.equal(received.result(20)[0], TENSORS[0][1])
    member.close()
    first.result().close()


def test_a_secret_is_not_shown() -> None:
    assert SECRET not in repr(Transfer("tcp://h:1", 2, SECRET)) and SECRET not in str(Transfer("tcp://h:1", 2, SECRET))


@pytest.mark.parametrize("secret", ["", "other", SECRET[:-1], SECRET.upper()])
def test_who_has_another_secret_does_not_join_and_the_sender_ends_in_time(secret: str) -> None:
    port = free_port()
    with sender(port, seconds=1.0) as first:
        error = within(60, lambda: opened(port, 1, 2, secret, seconds=1.0))
        assert isinstance(error, ClusterError) and "must join" in str(error)
        with pytest.raises(ClusterError, match="within deadlines.sync = 1 s, but: no rank has proved that it is 1"):
            first.result(60)


def test_a_member_does_not_follow_a_sender_with_another_secret() -> None:
    port = free_port()
    with Gate("127.0.0.1", port, 2, "other"), pytest.raises(OSError, match="hung up|not the sender"):
        join("127.0.0.1", port, 1, SECRET, time.monotonic() + 1.0)


def test_a_stranger_that_listens_in_the_senders_place_learns_nothing_it_could_use() -> None:
    """It is told a proof of the number that it chose itself, and no other."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        joining = pool.submit(join, "127.0.0.1", port, 1, SECRET, time.monotonic() + 1.0)
        connection, _ = server.accept()
        with connection:
            connection.sendall(bytes(NONCE))
            claim = rendezvous.read(connection, PLACE.size + NONCE + PROOF, time.monotonic() + 20)
            connection.sendall(claim[-PROOF:])  # its own proof sent back
            assert connection.recv(1) == b""
        server.close()
        with pytest.raises(OSError):
            joining.result(60)
    with Gate("127.0.0.1", free_port(), 2, SECRET) as gate, connected(gate._listener.getsockname()[1]) as stranger:
        rendezvous.read(stranger, NONCE, time.monotonic() + 20)
        stranger.sendall(claim)  # said again to the true sender
        assert stranger.recv(1) == b""
        assert gate.members == {}


GARBAGE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(200),
    b"\xff" * 5000,
    PLACE.pack(1) + bytes(NONCE + PROOF),
    PLACE.pack(2**32 - 1) + bytes(NONCE + PROOF),
]


def test_slow_and_noisy_strangers_in_great_number_do_not_keep_the_members_out() -> None:
    port = free_port()
    with ExitStack() as stack, sender(port) as first:
        for number in range(3 * MOST_STRANGERS):
            stranger = stack.enter_context(connected(port))
            with suppress(OSError):  # it may be one too many by now
                stranger.sendall(GARBAGE[number % len(GARBAGE)])
        finish(first, port)


def test_a_stranger_that_sends_a_byte_now_and_then_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "STRANGER_SECONDS", 0.5)
    with Gate("127.0.0.1", free_port(), 2, SECRET) as gate, connected(gate._listener.getsockname()[1]) as stranger:
        rendezvous.read(stranger, NONCE, time.monotonic() + 20)
        with pytest.raises(OSError):
            for _ in range(600):
                stranger.sendall(b"x")
                time.sleep(0.1)
        assert gate._strangers == []


def test_nothing_listens_once_the_group_has_formed() -> None:
    port = free_port()
    with sender(port) as first:
        member = opened(port, 1, 2)
        first.result(20)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=20)
        member.close()
        first.result().close()


def test_a_claim_of_a_place_that_is_not_in_the_group_is_refused() -> None:
    port = free_port()
    with Gate("127.0.0.1", port, 2, SECRET) as gate:
        for rank in (0, 2, 7):
            with pytest.raises(OSError):
                join("127.0.0.1", port, rank, SECRET, time.monotonic() + 0.3)
        assert gate.members == {}


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_of_a_stranger_prove_anything(gate: Gate, sent: bytes) -> None:
    with connected(gate._listener.getsockname()[1]) as stranger, suppress(OSError):
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        assert len(stranger.makefile("rb").read()) == NONCE, "no proof comes back"
    assert gate.members == {}


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate("127.0.0.1", free_port(), 3, SECRET) as gate:
        yield gate


def ends() -> tuple[Member, Member, socket.socket, socket.socket]:
    one, other = socket.socketpair()
    key = prove(SECRET, "key")
    return Member(one, key, "sender", "member"), Member(other, key, "member", "sender"), one, other


def test_messages_arrive_in_order_and_only_as_they_were_sent() -> None:
    until = time.monotonic() + 20
    mine, theirs, one, _ = ends()
    for number in range(3):
        mine.send({"n": str(number)}, until)
        assert theirs.receive(until) == {"n": str(number)}
    theirs.send({"to": "me"}, until)
    assert mine.receive(until) == {"to": "me"}
    mine.send({}, until)
    mine.sent -= 1
    mine.send({}, until)  # the same once more
    assert theirs.receive(until) == {}
    with pytest.raises(ConnectionError, match="no rank's"):
        theirs.receive(until)
    mine, theirs, one, other = ends()
    theirs.send({"a": "b"}, until)
    one.sendall(other.recv(0) + one.recv(1000))  # what it said itself comes back
    with pytest.raises(ConnectionError, match="no rank's"):
        theirs.receive(until)
    mine, theirs, one, _ = ends()
    one.sendall(struct.pack("!I", 2**32 - 1))
    with pytest.raises(ConnectionError, match="no rank's"):
        theirs.receive(until)


class Keys(dict[str, bytes]):
    def list_keys(self) -> list[str]:
        return list(self)

    def get(self, key: str, *_: Any) -> Any:
        return self[key]

    def set(self, key: str, value: bytes) -> None:
        self[key] = value


def test_what_one_store_holds_all_hold() -> None:
    until = time.monotonic() + 20
    pairs = [socket.socketpair() for _ in range(2)]
    hub = [Member(pair[0], b"k", "sender", "member") for pair in pairs]
    stores = [Keys({f"of {rank}": os.urandom(3)}) for rank in range(3)]
    shared = [SharedStore(stores[0], hub, until)]
    for rank, pair in enumerate(pairs, start=1):
        shared.append(SharedStore(stores[rank], [Member(pair[1], b"k", "member", "sender")], until))
    while not (set(stores[0]) == set(stores[1]) == set(stores[2]) == {"of 0", "of 1", "of 2"}):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert stores[0] == stores[1] == stores[2]
    before = threading.active_count()
    for item in shared:
        item.close()
    assert threading.active_count() == before - 7


def test_a_sender_that_dies_before_all_are_there_frees_the_members_at_once() -> None:
    port = free_port()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with Gate("127.0.0.1", port, 3, SECRET) as gate:
            joining = pool.submit(opened, port, 1, 3, SECRET, 0.0 + 15)
            while 1 not in gate.members:
                assert time.monotonic() < began + 20
                time.sleep(0.01)
            rendezvous.hang_up(gate.members[1].connection)
        with pytest.raises(ClusterError, match="the other end hung up"):
            joining.result(14)


def test_a_stranger_in_the_group_itself_gets_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's own listener takes whoever connects first: what a stranger there lacks is the proof."""
    port = free_port()
    proofs = group.prove

    def guess(secret: str, *parts: Any) -> bytes:
        stranger = threading.current_thread().name.startswith("stranger")
        return proofs("guess" if stranger else secret, *parts)

    monkeypatch.setattr(group, "prove", guess)
    with sender(port) as first, ThreadPoolExecutor(1, "stranger") as pool:
        joining = pool.submit(opened, port, 1, 2)
        with pytest.raises(ClusterError, match=r"must prove that it is of this run, but \[1\] did not"):
            first.result(20)
        with pytest.raises(ClusterError):
            joining.result(20)


def test_torchs_own_client_is_a_stranger_like_any_other() -> None:
    """With a TCPStore in the gate's place it could list the keys and take rank 1's place."""
    port = free_port()
    with sender(port) as first:
        connected(port).close()
        with pytest.raises(RuntimeError):
            torch.distributed.TCPStore("127.0.0.1", port, 2, False, group.timedelta(seconds=1))
        finish(first, port)
