"""One small HTTP server on `metrics.port`: /metrics for Prometheus, /healthz and /readyz for Kubernetes."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.observe.health import Health
from grpo.run.threads import PAUSE_SECONDS, start_lasting

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

CLIENT_SECONDS = 10.0
"""That a client has for its request and the answer, however slowly it sends."""
MOST_CLIENTS = 64
"""Connections at a time; one more ends the oldest, so that idle ones never keep a probe out."""
ALLOWED = ("GET", "HEAD")


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each client, so that none waits for another; few at a time, and none for long."""

    daemon_threads = True
    request_queue_size = 128  # with Python's 5 a burst of clients waits for seconds before it is even accepted
    most_clients, client_seconds = MOST_CLIENTS, CLIENT_SECONDS

    def __init__(self, *arguments: Any) -> None:
        self._clients: dict[socket.socket, float] = {}
        self._guard = threading.Lock()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next client, among at most `most_clients`."""
        for _ in range(1000):
            if len(self._clients) < self.most_clients:
                break
            self._end_clients(oldest=True)
            time.sleep(0.001)  # for its thread to close it
        try:
            client, address = super().get_request()
        except OSError:  # no descriptor is free, and the client stays in the queue
            self._end_clients(oldest=True)
            time.sleep(PAUSE_SECONDS)
            raise
        with self._guard:
            self._clients[client] = time.monotonic()
        return client, address

    def shutdown_request(self, request: Any) -> None:
        """Closes the connection, whatever state it is in."""
        with self._guard:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called several times a second: ends the clients whose time is over."""
        self._end_clients(oldest=False)

    def _end_clients(self, oldest: bool) -> None:
        now = time.monotonic()
        with self._guard:
            late = [client for client, since in self._clients.items() if now - since > self.client_seconds]
            for client in late or list(self._clients)[: int(oldest)]:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it

    def handle_error(self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object) -> None:
        """A client that goes away or hangs is its own affair; anything else is a mistake of ours and is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(WSGIRequestHandler):
    """One request, read within CLIENT_SECONDS and not logged."""

    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds; a line for each would bury the run's own."""


class Application:
    """Answers requests. Texts are one line; the metrics are Prometheus's own affair."""

    def __init__(self, registry: CollectorRegistry, health: Health) -> None:
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._lines: dict[str, Callable[[], tuple[bool, str]]] = {
            "/healthz": health.health,
            "/readyz": health.readiness,
        }

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> list[bytes]:
        status, headers, body = self._answer(environ)
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def _answer(self, environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]], bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ALLOWED:
            status, headers, body = _line(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
            return status, [*headers, ("Allow", ", ".join(ALLOWED))], body
        if path == "/metrics":
            started: list[tuple[str, list[tuple[str, str]]]] = []
            pieces = self._metrics({**environ, "REQUEST_METHOD": "GET"}, lambda *answer: started.append(answer))
            (status, headers), body = started[0], b"".join(pieces)
            return status, headers, body
        if path in self._lines:
            good, text = self._lines[path]()
            return _line(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, text)
        return _line(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz")


def _line(status: HTTPStatus, text: str) -> tuple[str, list[tuple[str, str]], bytes]:
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
    return f"{status.value} {status.phrase}", headers, f"{text}\n".encode()


@contextlib.contextmanager
def serving(host: str, port: int, registry: CollectorRegistry, health: Health) -> Iterator[int]:
    """Answers on `host` and `port` (0 lets the system choose) as long as the context lasts; yields the port.

    Raises OSError if the port cannot be opened.
    """
    server = make_server(host, port, Application(registry, health), Server, Handler)
    ended = threading.Event()
    thread = start_lasting("metrics-server", server.serve_forever, ended)
    try:
        yield server.server_port
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join(CLIENT_SECONDS)


@contextlib.contextmanager
def serving_run(config: Config, registry: CollectorRegistry, health: Health) -> Iterator[int | None]:
    """Answers on `metrics.port`; 0 lets the system choose, null is nowhere. On a laptop nobody else needs to read it.

    Yields the port. Raises ConfigError if it cannot be opened.
    """
    port = config.metrics.port
    with contextlib.ExitStack() as stack:
        if port is not None:
            host = "127.0.0.1" if config.cluster.address is None else "0.0.0.0"
            try:
                port = stack.enter_context(serving(host, port, registry, health))
            except OSError as error:
                raise ConfigError(
                    f"metrics.port: /metrics needs a free port, but {port} cannot be opened ({error.strerror}); "
                    "choose another, 0 for any free one or null for none"
                ) from error
        yield port
