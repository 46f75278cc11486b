"""A hub on the loopback, as far as `grpo fetch` asks one."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """`files` of one repository at COMMIT; large ones (LFS) are named in `large`. `spoiled` come with other bytes."""

    def __init__(self, repository: str, files: dict[str, bytes], large: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repository, self.files, self.large = repository, files, large
        self.spoiled: set[str] = set()
        self.sent: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def siblings(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entries.append({"rfilename": name, "size": len(content), "blobId": blob})
            if name in self.large:
                entries[-1]["lfs"] = {
                    "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130
                }  # fmt: skip
        return entries


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        kind = "datasets/" if self.server.repository.startswith("datasets/") else "models/"
        name = self.server.repository.removeprefix("datasets/")
        if path == f"/api/{kind}{name}/revision/{COMMIT}":
            content = json.dumps({"id": name, "sha": COMMIT, "siblings": self.server.siblings()}).encode()
            return self.send(200, content, body, "application/json")
        start = f"/{self.server.repository}/resolve/{COMMIT}/"
        file = path.removeprefix(start)
        if path.startswith(start) and file in self.server.files:
            content = self.server.files[file]
            etag = hashlib.sha256(content).hexdigest()
            if body:
                self.server.sent.append(file)
                if file in self.server.spoiled:
                    self.server.spoiled.discard(file)
                    content = bytes(len(content))
            return self.send(
                200, content, body, "application/octet-stream", {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            )
        self.send(404, b"{}", body, "application/json", {"X-Error-Code": "RepoNotFound"})

    def send(self, code: int, content: bytes, body: bool, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(repository: str, files: dict[str, bytes], large: set[str] = frozenset()) -> Iterator[Hub]:  # type: ignore[assignment]
    found = Hub(repository, files, set(large))
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        found.server_close()
        thread.join()
