"""Small actors in the place of vLLM and DeepSpeed: integers for weights, sockets for the transfer, real processes.

Everything above them is the product: Ray, session, fleet, controller, checkpoints, rewards. They start in a moment, so
hundreds of kills fit into minutes, and they are exact: whatever is lost, doubled or stale changes the digests.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.cluster.actors import free_address, free_addresses, node_id
from grpo.config import Config
from grpo.errors import CheckpointError, ClusterError, EngineLost, WeightSyncError
from grpo.interfaces import Place, Transfer
from grpo.run.faults import fault_point
from grpo.store import open_store
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord
from tests.chaos.core import logprobs, number

NAMES = ("embed", "layer", "head")
WIDTH = 8
STEP_SECONDS = 0.15  # some steps pass before the loss of Ray's head is noticed
Weights = dict[str, list[int]]


def digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def record(name: str, values: list[int]) -> TensorRecord:
    return TensorRecord(name, (WIDTH,), "float32", digest(values))


def flat(weights: Weights) -> list[int]:
    return [value for name in NAMES for value in weights[name]]


class FakeEngineActor:
    """Like VLLMActor, with `core.py` for the engine core."""

    def __init__(self, config: Config, index: int, device: str) -> None:
        self.config, self.index = config, index
        self.weights: Weights = {}
        self.shadow: Weights = {}
        self.version: int | None = None
        self.broken = False
        self.link: socket.socket | None = None
        self.turn = asyncio.Lock()
        self.abandoned = 0

    async def start(self) -> Place:
        core = str(Path(__file__).with_name("core.py"))
        pipe = asyncio.subprocess.PIPE
        self.core = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", core, stdin=pipe, stdout=pipe, limit=1 << 24
        )
        await self.ask({})
        return Place(node_id(), [os.getpid(), self.core.pid])

    async def ping(self, seconds: float) -> None:
        pass

    async def health(self, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                await self.ask({})
        except TimeoutError:
            raise EngineLost(f"engine {self.index} does not answer") from None
        return "ok"

    async def ask(self, request: dict[str, object]) -> Any:
        assert self.core.stdin and self.core.stdout
        async with self.turn:
            with contextlib.suppress(ConnectionError, RuntimeError):  # a pipe that is closed, or closed to asyncio
                self.core.stdin.write(json.dumps(request).encode() + b"\n")
                await self.core.stdin.drain()
                if (line := await self.core.stdout.readline()).endswith(b"\n"):
                    return json.loads(line)
        raise EngineLost(f"engine {self.index}: its core died")

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        if self.version is None:
            raise WeightSyncError(f"engine {self.index} samples only from committed weights")
        groups, abandoned = [], self.abandoned
        for prompt, seed in requests:
            if abandoned != self.abandoned:
                raise ClusterError("the requests were dropped")
            groups.append(await self.group(prompt, seed, sampling))
        return groups

    async def group(self, prompt: Prompt, seed: int, sampling: Sampling) -> Group:
        version, request = self.version, {"weights": flat(self.weights), "token_ids": prompt.token_ids, "seed": seed}
        assert version is not None
        made = await self.ask(request | {"samples": sampling.samples_per_prompt})
        samples = [
            Sample(prompt.id, index, prompt.token_ids, (*ids,), (*logs,), ((0, version),), "stop", f"#### {sum(ids)}")
            for index, (ids, logs) in enumerate(made)
        ]
        return Group(prompt, tuple(samples))

    async def join_transfer(self, transfer: Transfer, place: int) -> None:
        if self.link:
            self.link.close()
        self.link = await asyncio.to_thread(connect, *meeting(transfer), self.config.deadlines.sync)

    async def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> list[Manifest]:
        if self.broken:
            raise WeightSyncError(f"engine {self.index} is stale: a sync broke off")
        assert self.link
        self.shadow = {}
        if not ahead:
            self.version, self.broken = None, True
        received = {}
        for _ in NAMES:
            name, values = json.loads(await asyncio.to_thread(read_line, self.link))
            received[name] = values
        if ahead:
            self.shadow = received
        else:
            self.weights, self.broken = received, False
        return [Manifest(version, tuple(record(name, values) for name, values in received.items()))]

    async def commit_weights(self, version: int, in_flight: bool = False) -> float:
        self.weights, self.shadow = self.shadow or self.weights, {}
        self.version = version
        return 0.0

    async def rest(self) -> None:
        self.weights, self.version = {}, None

    async def abandon(self) -> None:
        self.abandoned += 1

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        answer: list[float] = await self.ask({"weights": flat(self.weights), "self_test_prompt": list(token_ids)})
        return answer

    async def close(self) -> None:
        self.core.kill()


class FakeRankActor:
    """Like PolicyModelActor: an update is a hash of the weights, the moments and everything in the batch."""

    def __init__(self, config: Config, rank: int, device: str) -> None:
        self.config, self.rank = config, rank
        self.weights: Weights = {name: [number(name, place) for place in range(WIDTH)] for name in NAMES}
        self.moments: Weights = {name: [0] * WIDTH for name in NAMES}
        self.kept: Weights | None = None
        self.copied: dict[int, str] = {}
        self.published: dict[int, Weights] = {}
        self.links: list[socket.socket] = []
        self.peers: list[socket.socket] = []

    def address(self) -> tuple[str, int]:
        return free_address()

    def ping(self, seconds: float) -> None:
        pass

    def start(self, host: str, port: int) -> Place:
        others = self.config.train.ranks - 1
        if self.rank == 0 and others:
            self.peers = accept(port, others, self.config.deadlines.start)
        elif others:
            self.peers = [connect(host, port, self.config.deadlines.start)]
        return Place(node_id(), [os.getpid()])

    def meet(self) -> None:
        """A collective: waits for all ranks; one that died breaks it for the others."""
        for peer in self.peers:
            peer.sendall(b"x\n")
        for peer in self.peers:
            read_line(peer)

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        rows = [[row.prompt_id, row.index, row.output_ids, row.logprobs, row.advantage] for row in batch]
        fault_point("train.forward", step, self.rank)
        time.sleep(STEP_SECONDS)
        gradient = {name: number(self.weights[name], rows) for name in NAMES}
        self.meet()
        fault_point("train.optimizer", step, self.rank)
        for name in NAMES:
            self.moments[name] = [number(value, gradient[name]) for value in self.moments[name]]
            self.weights[name] = [number(*pair) for pair in zip(self.weights[name], self.moments[name], strict=True)]
        fault_point("train.stepped", step, self.rank)
        self.meet()
        return {"train/loss": number(flat(self.weights)) / 2**48, "train/updates": 1.0, "train/tokens": 1.0}

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        self.meet()
        return {"eval/loss": number(flat(self.weights), [row.output_ids for row in batch]) / 2**48}

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        self.snapshot(step)
        return self.write(folder, step)

    def snapshot(self, step: int) -> None:
        self.meet()
        self.copied = {step: json.dumps({"weights": self.weights, "moments": self.moments})}

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        store = open_store(folder)
        with store.workspace("") as local:
            Path(local, f"rank-{self.rank}.json").write_text(self.copied[step])
            fault_point("save.files", step, self.rank)
            return store.publish(local, "")

    def load(self, folder: str, names: Sequence[str], step: int) -> tuple[str, ...]:
        with open_store(folder).fetch("", names) as local:
            path = local / "rank-0.json"
            if not path.exists():
                raise CheckpointError(f"{path} is missing")
            state = json.loads(path.read_text())
        self.weights, self.moments = state["weights"], state["moments"]
        fault_point("resume.loaded", step, self.rank)
        return ()

    def records(self) -> tuple[TensorRecord, ...]:
        return tuple(record(name, self.weights[name]) for name in NAMES)

    def tolerance(self) -> float:
        return 0.2

    def try_saving(self, folder: str) -> None:
        pass

    def offer_transfers(self, lanes: int, near: bool) -> tuple[str, ...]:
        return tuple(f"tcp://{host}:{port}" for host, port in free_addresses(1))

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> None:
        for link in self.links:
            link.close()
        [transfer] = transfers
        self.links = accept(meeting(transfer)[1], transfer.size - 1, self.config.deadlines.sync)

    def send_weights(self, version: int) -> Manifest | None:
        return None if self.rank else self._send(version, self.weights)

    def publish(self, version: int, oldest: int) -> float:
        if self.rank:
            return 0.0
        self.published = {known: kept for known, kept in self.published.items() if known >= oldest}
        self.published[version] = dict(self.weights)  # an update makes new lists
        return 4.0 * WIDTH * len(NAMES) * len(self.published)

    def send_published(self, version: int) -> Manifest:
        return self._send(version, self.published[version])

    def _send(self, version: int, weights: Weights) -> Manifest:
        for name in NAMES:
            try:
                for link in self.links:
                    link.sendall(json.dumps([name, weights[name]]).encode() + b"\n")
            except OSError as error:
                raise ClusterError(f"the transfer broke off: {error}") from error
            fault_point("sync.tensor", version, self.rank)
        return Manifest(version, tuple(record(name, weights[name]) for name in NAMES))

    def perturb(self, scale: float, seed: int) -> None:
        assert self.kept is None, "the weights are perturbed already"
        self.kept, self.weights = self.weights, {name: [number(v, seed) for v in self.weights[name]] for name in NAMES}

    def restore(self) -> None:
        assert self.kept is not None
        self.weights, self.kept = self.kept, None

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return logprobs(flat(self.weights), list(token_ids))

    def close(self) -> None:
        pass


def meeting(transfer: Transfer) -> tuple[str, int]:
    host, _, port = transfer.url.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def accept(port: int, count: int, seconds: float) -> list[socket.socket]:
    with socket.create_server(("", port)) as server:
        server.settimeout(seconds)
        try:
            return [server.accept()[0] for _ in range(count)]
        except TimeoutError as error:
            raise ClusterError("an end of the transfer did not come") from error


def connect(host: str, port: int, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            link = socket.create_connection((host, port), timeout=seconds)
            link.settimeout(seconds)
            return link
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"no connection to {host}:{port}: {error}") from error
            time.sleep(0.02)


def read_line(link: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        try:
            piece = link.recv(1)
        except OSError as error:
            raise ClusterError(f"the other end is silent: {error}") from error
        if not piece:
            raise ClusterError("the other end died")
        line += piece
    return line
