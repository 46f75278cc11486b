"""What the HTTP server answers, over real sockets."""

import gzip
import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from grpo.config import Config
from grpo.observe.health import Health
from grpo.observe.server import Handler, Server, serving

SECONDS = 10


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(Config.model_validate({"model": {"path": "x"}}), clock)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("grpo_step", "Last step.", registry=registry).set(7)
    return registry


@pytest.fixture
def port(registry: CollectorRegistry, health: Health) -> Iterator[int]:
    with serving("127.0.0.1", 0, registry, health) as port:
        yield port


@pytest.fixture(scope="module")
def quiet_port() -> Iterator[int]:
    """Of a server that all tests share which only ask."""
    with serving("127.0.0.1", 0, CollectorRegistry(), Health(Config.model_validate({"model": {"path": "x"}}))) as port:
        yield port


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_metrics_are_prometheuss(port: int) -> None:
    status, body, headers = ask(port, "/metrics")
    assert (status, body.splitlines()[-1]) == (200, b"grpo_step 7.0")
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert int(headers["Content-Length"]) == len(body)


def test_metrics_may_be_packed_and_may_be_openmetrics(port: int) -> None:
    _, body, headers = ask(
        port, "/metrics", **{"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"grpo_step 7.0\n# EOF\n")


def test_the_states_of_a_run_in_their_order(port: int, health: Health, clock: Clock) -> None:
    def states() -> tuple[int, int]:
        return ask(port, "/healthz")[0], ask(port, "/readyz")[0]

    assert states() == (200, 503)
    health.alive("weight_sync")
    assert states() == (200, 503)
    health.ready()
    health.alive("train")
    assert states() == (200, 200)
    clock.now += 1800 + 900 + 60 + 1  # the defaults of deadlines.train, start and health
    assert states() == (503, 200)
    health.alive()
    assert states() == (200, 200)


def test_a_refusal_is_one_line_that_says_why(port: int, health: Health, clock: Clock) -> None:
    assert ask(port, "/readyz")[1] == (
        b"starting: engines and ranks must be ready and the first weight sync verified\n"
    )
    health.alive("train")
    clock.now += 4000
    line = ask(port, "/healthz")[1].decode()
    assert line.startswith("train: no progress for 4000 s, since ") and line.count("\n") == 1
    assert "the limit is 2760 s (deadlines.train + start + health)" in line


@pytest.mark.parametrize(
    "path",
    ["/", "/metrics/", "/metrics/x", "/healthz/..", "/favicon.ico", "/%6detrics/a", "/a?b=/metrics"],
)
def test_other_paths_are_not_found(quiet_port: int, path: str) -> None:
    assert ask(quiet_port, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/nowhere"])
def test_other_methods_are_refused(quiet_port: int, path: str, method: str) -> None:
    status, _, headers = ask(quiet_port, path, method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/nowhere"])
def test_head_is_get_without_the_body(port: int, path: str) -> None:
    status, body, headers = ask(port, path, "HEAD")
    got_status, got_body, got_headers = ask(port, path)
    assert (status, body, headers["Content-Length"]) == (got_status, b"", got_headers["Content-Length"])
    assert int(headers["Content-Length"]) == len(got_body) > 0
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:  # http.client does not look
        client.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        assert client.makefile("rb").read().endswith(b"\r\n\r\n")


def test_hanging_clients_keep_nobody_waiting(port: int) -> None:
    with ExitStack() as stack:
        for sent in (b"", b"GET /metrics HTT", b"GET /metrics HTTP/1.1\r\nHost: x\r\n") * 20:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS))
            client.sendall(sent)
        assert ask(port, "/healthz")[0] == 200


def test_a_hanging_client_is_let_go(
    registry: CollectorRegistry, health: Health, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Handler, "timeout", 0.1)
    with serving("127.0.0.1", 0, registry, health) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(SECONDS)
        client.sendall(b"GET /metrics HTT")
        assert client.recv(100) == b""
        assert ask(port, "/metrics")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_garbage_and_clients_that_hang_up_change_nothing(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    for sent in (
        b"\x16\x03\x01\x00",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"A" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
            client.sendall(sent)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a farewell
    assert ask(port, "/healthz")[0] == 200
    assert capfd.readouterr().out == ""


def test_a_mistake_of_ours_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(("127.0.0.1", 0), Handler)
    try:
        try:
            raise ValueError("ours")
        except ValueError:
            server.handle_error(None, ("127.0.0.1", 1))
    finally:
        server.server_close()
    assert "ValueError: ours" in capfd.readouterr().err


def servers() -> int:
    return [thread.name for thread in threading.enumerate()].count("metrics-server")


def test_the_port_is_free_again_and_no_thread_is_left(registry: CollectorRegistry, health: Health) -> None:
    before = servers()
    with serving("127.0.0.1", 0, registry, health) as port:
        assert servers() == before + 1
        with pytest.raises(OSError), serving("127.0.0.1", port, registry, health):
            pass
    assert servers() == before
    with serving("127.0.0.1", port, registry, health) as again:
        assert again == port
