"""Moto's S3 on the loopback, behind a layer that refuses, cuts off or drops requests."""

from collections.abc import Callable

from moto.server import DomainDispatcherApplication, create_backend_app


class Server:
    """`plan(method, path)` says what happens to a request: "500", "503", "cut" (half of the body) or nothing."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.plan: Callable[[str, str], str | None] = lambda method, path: None
        self.struck: list[str] = []

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.plan(method, path)
        if fault:
            self.struck.append(f"{method} {path}")
        if fault in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {"500": "InternalError", "503": "ServiceUnavailable"}[fault]
            start_response(f"{fault} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]
        body = list(self.app(environ, start_response))
        return [b"".join(body)[: sum(map(len, body)) // 2]] if fault == "cut" else body

    def times(self, count: int, fault: str, method: str, name: str) -> None:
        """The next `count` requests of this kind meet the fault."""
        goal = len(self.struck) + count
        self.plan = lambda verb, path: fault if verb == method and name in path and len(self.struck) < goal else None
