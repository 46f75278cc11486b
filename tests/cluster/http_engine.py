"""A second kind of engine behind `interfaces.Engine`: reached over HTTP, on no node of ours, its weights from a folder.

It stands for an inference server that somebody else runs. The server below is a small one with a real socket; what a
sync leaves in the folder (`file://`) is what it samples from.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.request import Request, urlopen

from grpo.errors import EngineLost, GrpoError
from grpo.interfaces import Call, Place, Transfer
from grpo.types import Group, Manifest, Prompt, Sample, Sampling, TensorRecord
from tests.fakes import sample

R = TypeVar("R")


class HttpEngine:
    """The driver's side: every verb is a request from a thread, which a dead server answers with EngineLost."""

    role = "rollout"
    receivers = lane = 0  # nobody of it joins the trainer's process group

    def __init__(self, url: str, index: int) -> None:
        self.url, self.index = url, index
        self.node_id, self.pids = "", list[int]()  # on no node of ours
        self.lost: GrpoError | None = None
        self.folder = ""
        self._threads = ThreadPoolExecutor(4, f"engine-{index}")

    def __str__(self) -> str:
        return f"engine {self.index} at {self.url}"

    def _call(self, verb: str, body: object, read: Callable[[Any], R]) -> Call[R]:
        future: Future[R] = self._threads.submit(self._ask, verb, body, read)
        return Call(self, future)

    def _ask(self, verb: str, body: object, read: Callable[[Any], R]) -> R:
        request = Request(f"{self.url}/{verb}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=30) as answer:
                return read(json.load(answer))
        except (URLError, OSError) as error:
            raise EngineLost(f"{self} does not answer: {error}") from error

    def start(self) -> Call[Place]:
        return self._call("health", {}, lambda _: Place("", []))

    def ping(self, seconds: float) -> Call[object]:
        return self._call("health", {}, lambda _: None)

    def health(self, seconds: float) -> Call[object]:
        return self.ping(seconds)

    def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> Call[list[Group]]:
        wanted = [
            {"ids": prompt.token_ids, "seed": seed, "n": sampling.samples_per_prompt} for prompt, seed in requests
        ]

        def read(answers: list[list[dict[str, Any]]]) -> list[Group]:
            return [
                Group(prompt, tuple(made(prompt, n, each) for n, each in enumerate(each_prompt)))
                for (prompt, _), each_prompt in zip(requests, answers, strict=True)
            ]

        return self._call("generate", wanted, read)

    def abandon(self) -> Call[None]:
        return self._call("health", {}, lambda _: None)  # it answers at once: nothing is under way

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Call[list[float]]:
        return self._call("logprobs", list(token_ids), list)

    def join_transfer(self, transfer: Transfer, place: int) -> Call[None]:
        self.folder = transfer.url.removeprefix("file://")
        return self._call("health", {}, lambda _: None)

    def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        assert not ahead, "this server has no room for a second copy"

        def read(taken: dict[str, str]) -> list[Manifest]:
            return [Manifest(version, tuple(TensorRecord(name, (2,), "float32", d) for name, d in taken.items()))]

        return self._call("load", {"file": f"{self.folder}/{version}.json"}, read)

    def commit_weights(self, version: int, in_flight: bool = False) -> Call[float]:
        return self._call("commit", {"version": version}, lambda _: 0.0)

    def rest(self) -> Call[None]:
        raise NotImplementedError("this server has a GPU of its own")

    def close(self) -> Call[None]:
        return self._call("health", {}, lambda _: None)

    def end(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stacks(self) -> str:
        return ""

    def wanted_node(self) -> str:
        return ""

    def node_is_lost(self) -> bool:
        return False


def made(prompt: Prompt, index: int, answer: dict[str, Any]) -> Sample:
    like = sample(prompt, index, answer["version"], answer["text"])
    ids = tuple(answer["ids"])
    return replace(like, output_ids=ids, logprobs=(-0.5,) * len(ids))


class Server(ThreadingHTTPServer):
    """What somebody else runs: weights are digests by name; a completion tells the weights that made it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.weights: dict[str, str] = {}
        self.version = -1
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, verb: str, body: Any) -> object:
        self.requests.append(verb)
        if verb == "load":
            self.weights = json.loads(Path(body["file"]).read_text())
            return self.weights
        if verb == "commit":
            self.version = body["version"]
        if verb == "logprobs":
            moved = any("~" in digest for digest in self.weights.values())
            return [-9.0 if moved else -1.0, float(-len(self.weights))]
        if verb == "generate":
            return [[self.completion(request, n) for n in range(request["n"])] for request in body]
        return {}

    def completion(self, request: dict[str, Any], index: int) -> dict[str, object]:
        return {"ids": [7, 8 + index], "text": f"#### {index + 1}", "version": self.version}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps(self.server.answer(self.path[1:], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass
