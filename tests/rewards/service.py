"""A real HTTP server whose answers a test scripts."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[int, dict], object]
"""From the number of the request (from 1) and its JSON to the reply: a value for JSON, bytes, or (status, bytes)."""


class Service:
    """`requests` are the bodies it got, `headers` those of each; `most` were under way at once."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.most = self._now = 0
        self.lock = threading.Lock()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            number = len(self.requests)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self.answer(number, body)
        finally:
            with self.lock:
                self._now -= 1
        if reply is None:  # hang up without a word
            handler.close_connection = True
            return
        status, content, headers = 200, reply, {}
        if isinstance(reply, tuple):
            status, content, headers = (*reply, {})[:3]
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"content-length": len(content), **headers}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def service(answer: Answer):
    """`with service(answer) as (url, seen):` on a port of its own."""
    seen = Service(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.serve(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def slowly(seconds: float, value: object) -> Answer:
    def answer(_: int, __: dict) -> object:
        time.sleep(seconds)
        return value

    return answer
