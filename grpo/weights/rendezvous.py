"""How the ranks of a transfer meet: over connections whose two ends have proved that they know its secret.

torch's own store (TCPStore) answers whoever reaches its port: keys can be listed, read and replaced, and with them goes
a rank's place in the group. Here each rank has a store in its own memory, and what its group writes there travels to
the other ranks only over proven connections. Rank 0 listens until all have come, and no longer than the group needs to
form. The secret is made for one transfer by the driver and handed to its members by Ray; it never travels here.

    rank 0 -> member    nonce
    member -> rank 0    place, nonce, HMAC(secret, "member", both nonces, place)
    rank 0 -> member    HMAC(secret, "sender", both nonces, place)
    then, both ways     length, MAC, JSON; the MAC counts the messages, and its key follows from secret and nonces

The first message is rank 0's and empty: all are there. A stranger has STRANGER_SECONDS, and a place among few, for its
proof; nobody waits for it.
"""

import contextlib
import errno
import hmac
import json
import secrets
import socket
import struct
import threading
import time

from grpo.run.threads import start_lasting

NONCE, PROOF = 32, 32
PLACE = struct.Struct("!I")
MOST_STRANGERS, STRANGER_SECONDS = 32, 10.0
MOST_BYTES = 1 << 22
PAUSE_SECONDS = 0.002


def prove(secret: str, role: str, *parts: bytes) -> bytes:
    """What only a holder of the secret can say, of one role and these parts."""
    words = [role.encode(), *parts]
    return hmac.digest(secret.encode(), b"".join(PLACE.pack(len(word)) + word for word in words), "sha256")


class Member:
    """One proven connection: whole messages, in order, each with its MAC."""

    def __init__(self, connection: socket.socket, key: bytes, own: str, other: str) -> None:
        self.connection, self.key, self.own, self.other = connection, key.hex(), own, other
        self.sent = self.received = 0

    def send(self, message: dict[str, str], deadline: float) -> None:
        """Raises OSError."""
        body = json.dumps(message).encode()
        mac = prove(self.key, self.own, PLACE.pack(self.sent), body)
        self.sent += 1
        self.connection.settimeout(left(deadline))
        self.connection.sendall(PLACE.pack(len(body)) + mac + body)

    def receive(self, deadline: float) -> dict[str, str]:
        """The next message. Raises OSError, also for one that is not the other end's."""
        [size] = PLACE.unpack(read(self.connection, PLACE.size, deadline))
        if size > MOST_BYTES:
            raise ConnectionError("a message that is no rank's")
        mac = read(self.connection, PROOF, deadline)
        body = read(self.connection, size, deadline)
        if not hmac.compare_digest(mac, prove(self.key, self.other, PLACE.pack(self.received), body)):
            raise ConnectionError("a message that is no rank's")
        self.received += 1
        message: dict[str, str] = json.loads(body)
        return message


def left(deadline: float) -> float:
    """Seconds until a deadline of the monotonic clock. Raises TimeoutError behind it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is over")
    return seconds


def read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly so many bytes, however slowly they come. Raises OSError."""
    data = b""
    while len(data) < size:
        connection.settimeout(left(deadline))
        if not (more := connection.recv(size - len(data))):
            raise ConnectionError("the other end hung up")
        data += more
    return data


class Gate:
    """Rank 0's end: proves whoever connects, and keeps those that are members."""

    def __init__(self, host: str, port: int, world_size: int, secret: str) -> None:
        self.world_size, self.secret = world_size, secret
        self.members: dict[int, Member] = {}
        self._strangers: list[socket.socket] = []
        self._changed = threading.Condition()
        self._listener = listen(host, port)
        self._ended = threading.Event()
        self._thread = start_lasting("transfer-gate", self._accept, self._ended)

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        """Listens no more and lets strangers go; members stay connected."""
        self._ended.set()
        hang_up(self._listener)
        self._thread.join()
        self._listener.close()
        with self._changed:
            strangers = list(self._strangers)
        for connection in strangers:
            hang_up(connection)

    def wait(self, deadline: float) -> list[Member]:
        """All members, once all are there, which they are told. Raises OSError; it names the places that are not."""
        with self._changed:
            while len(self.members) < self.world_size - 1:
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    missing = sorted(set(range(1, self.world_size)) - set(self.members))
                    raise TimeoutError(f"no rank has proved that it is {', '.join(map(str, missing))}")
                self._changed.wait(min(seconds, 1.0))
            members = list(self.members.values())
        for member in members:
            member.send({}, deadline)
        return members

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody came, or no descriptor is free
                self._ended.wait(PAUSE_SECONDS)
                continue
            with self._changed:
                self._strangers.append(connection)
                oldest = self._strangers[0] if len(self._strangers) > MOST_STRANGERS else None
            if oldest is not None:
                hang_up(oldest)
            try:
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()
            except RuntimeError:  # no more threads: one fewer stranger
                self._forget(connection)
                connection.close()

    def _meet(self, connection: socket.socket) -> None:
        """The proofs of both ends, within STRANGER_SECONDS in all."""
        try:
            deadline = time.monotonic() + STRANGER_SECONDS
            mine = secrets.token_bytes(NONCE)
            connection.settimeout(STRANGER_SECONDS)
            connection.sendall(mine)
            claim = read(connection, PLACE.size + NONCE + PROOF, deadline)
            place, theirs, proof = claim[: PLACE.size], claim[PLACE.size : -PROOF], claim[-PROOF:]
            [rank] = PLACE.unpack(place)
            known = hmac.compare_digest(proof, prove(self.secret, "member", mine, theirs, place))
            if not known or not 0 < rank < self.world_size:
                raise ConnectionError("no member of this transfer")
            connection.sendall(prove(self.secret, "sender", mine, theirs, place))
            member = Member(connection, prove(self.secret, "key", mine, theirs, place), "sender", "member")
            with self._changed:
                old = self.members.pop(rank, None)  # it has come again: its first connection broke
                self.members[rank] = member
                self._changed.notify_all()
            if old is not None:
                hang_up(old.connection)
        except OSError:
            hang_up(connection)
            connection.close()
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._strangers.remove(connection)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at that address alone, or at all of this machine's where the address is not its own."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port), family=family, backlog=128)


def hang_up(connection: socket.socket) -> None:
    """Wakes up who reads from it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def join(host: str, port: int, rank: int, secret: str, deadline: float) -> Member:
    """A member's end, once all are there. Rank 0 may listen later: tries until the deadline, then OSError."""
    error: OSError = TimeoutError("the time is over")
    place = PLACE.pack(rank)
    while True:
        try:
            seconds = left(deadline)
        except TimeoutError:
            raise error from None
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=min(seconds, STRANGER_SECONDS))
            until = min(deadline, time.monotonic() + STRANGER_SECONDS)
            theirs, mine = read(connection, NONCE, until), secrets.token_bytes(NONCE)
            connection.sendall(place + mine + prove(secret, "member", theirs, mine, place))
            proof = read(connection, PROOF, until)
            if not hmac.compare_digest(proof, prove(secret, "sender", theirs, mine, place)):
                raise ConnectionError("who listens there is not the sender of this transfer")
        except OSError as failed:
            error = failed
            if connection is not None:
                connection.close()
            time.sleep(min(0.1, seconds))
            continue
        member = Member(connection, prove(secret, "key", theirs, mine, place), "member", "sender")
        member.receive(deadline)
        return member
