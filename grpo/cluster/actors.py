"""What runs in the actors: thin shells with verbs around the rollout engine and the trainer rank.

They fulfil `actor_protocols.py`. Heavy imports happen inside `start`, so that all actors import side by side and the
driver imports nothing heavy.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from grpo.config import Config
from grpo.errors import DeadlineExceeded
from grpo.interfaces import Place, Transfer
from grpo.rollout.environment import COMPILED_SHAPES, SPIN_COUNT, usable_cores
from grpo.run.memory import oom_kills
from grpo.run.start import Phases, process_began
from grpo.store import open_store
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord
from grpo.weights import Transport, seconds_of

if TYPE_CHECKING:
    from grpo.algorithm.objective import Objective


class VLLMActor:
    """A vLLM engine. The methods are coroutines: they run on the event loop that AsyncLLM needs."""

    def __init__(self, config: Config, index: int, device: str) -> None:
        self.config, self.index, self.device = config, index, device
        self.phases = Phases("process", process_began())

    async def start(self) -> Place:
        """Builds the engine; the pids are those of this process, of the engine core and of its workers."""
        self.phases.begin("imports")
        from ray.util import metrics

        from grpo.cluster.nodes import on_my_node
        from grpo.rollout.engine import RolloutEngine

        # A Ray of our own on this machine has nobody who collects metrics.
        wanted = metrics if self.config.cluster.address is not None else None
        together = on_my_node(self.config, self.config.rollout.most_engines)
        self.engine = RolloutEngine(self.config, self.index, self.device, wanted, self.phases, together)
        await self.engine.start()
        pids, notes = [os.getpid(), *self.engine.pids()], self.engine.start_notes
        return Place(node_id(), pids, oom_kills(), self.phases.end(), notes)

    async def ping(self, seconds: float) -> None:
        """A sign of life of this process."""

    async def health(self, seconds: float) -> str:
        """A sign of life of the engine: one token. Raises EngineLost."""
        return await self.engine.health(seconds)

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        return await self.engine.generate(list(requests), sampling)

    async def abandon(self) -> None:
        await self.engine.abandon()

    async def join_transfer(self, transfer: Transfer, place: int) -> None:
        await self.engine.join_transfer(transfer.url, place, transfer.size, transfer.secret)

    async def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> list[Manifest]:
        return await self.engine.receive_weights(version, records, ahead)

    async def commit_weights(self, version: int, in_flight: bool = False) -> float:
        return await self.engine.commit_weights(version, in_flight)

    async def rest(self) -> None:
        await self.engine.rest()

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return await self.engine.prompt_logprobs(list(token_ids))

    async def close(self) -> None:
        if hasattr(self, "engine"):
            await self.engine.shutdown()


class PolicyModelActor:
    """One DeepSpeed rank of the policy. Rank 0 sends the weights; the others take part in gathering them."""

    def __init__(self, config: Config, rank: int, device: str) -> None:
        self.config, self.rank, self.device = config, rank, device
        self.phases = Phases("process", process_began())
        self.transport: Transport | None = None
        self.turn = threading.Lock()  # of who sends

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous."""
        return free_address()

    def ping(self, seconds: float) -> None:
        """A sign of life of this process, from a thread beside the one that trains."""

    def start(self, host: str, port: int) -> Place:
        """Builds the DeepSpeed engine together with the other ranks."""
        self.phases.begin("imports")
        ranks = self.config.train.ranks
        on_cpu, offloads = self.device == "cpu", bool(self.config.train.offloads)
        if on_cpu:  # before torch is loaded
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", COMPILED_SHAPES)
        from grpo.cluster.nodes import on_my_node
        from grpo.trainer import PolicyTrainer

        self.trainer = PolicyTrainer(
            self.config,
            rank=self.rank,
            world_size=ranks,
            local_rank=self.rank if on_cpu else 0,  # Ray shows an actor its own GPUs only
            device=self.device,
            master_addr=host,
            master_port=port,
            total_steps=self.config.run.steps,
            # Ray gives an actor one; on GPUs they are of use where the CPU makes the optimizer's steps.
            threads=max(1, usable_cores() // on_my_node(self.config, ranks)) if on_cpu or offloads else None,
            phases=self.phases,
            objective=self._objective(),
        )
        return Place(node_id(), [os.getpid()], oom_kills(), self.phases.end(), self.trainer.notes)

    def _objective(self) -> "Objective | None":
        """What it minimises; None: the loss of GRPO."""
        return None

    def records(self) -> tuple[TensorRecord, ...]:
        return self.trainer.weight_records()

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        return self.trainer.step(batch, step)

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        return self.trainer.evaluate(batch)

    def tolerance(self) -> float:
        return self.trainer.tolerance

    def offer_transfers(self, lanes: int, near: bool) -> tuple[str, ...]:
        """Process groups that meet at free ports of this node: one for each lane of NCCL, else one for all."""
        from grpo.weights import choose_backend

        backend = choose_backend(self.config, self.device, near)
        count = lanes if backend == "nccl" else 1
        return tuple(f"{backend}://{host}:{port}" for host, port in free_addresses(count))

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> None:
        """Rank 0: joins the engines' transfer groups as their sender."""
        from grpo.weights import make_sender

        if self.transport:  # to engines of which one was lost
            self.transport.close()
        ends = [(transfer.url, transfer.size, transfer.secret) for transfer in transfers]
        self.transport = make_sender(self.config, self.device, ends)

    def send_weights(self, version: int) -> Manifest | None:
        """Sends every tensor; None on the ranks that only help to gather. A collective under ZeRO-3."""
        if self.config.roles_share_gpus:
            self.trainer.make_room()
        if self.rank == 0:
            with self._sending() as transport:
                sent = transport.send(version, self.trainer.iter_weights())
                return Manifest(version, sent, seconds_of(transport))
        for _ in self.trainer.iter_weights():
            pass
        return None

    def publish(self, version: int, oldest: int) -> float:
        """Rank 0 keeps a copy of the weights; the others help to gather them."""
        return float(self.trainer.publish(version, oldest))

    def send_published(self, version: int) -> Manifest:
        """Rank 0, in a thread beside the one that trains: sends a copy."""
        with self._sending() as transport, self.trainer.published.sending(version) as tensors:
            sent = transport.send(version, tensors)
            return Manifest(version, sent, seconds_of(transport))

    @contextlib.contextmanager
    def _sending(self) -> Iterator[Transport]:
        """The transfer, which has one sender at a time. Raises DeadlineExceeded."""
        seconds = self.config.deadlines.sync
        if not self.turn.acquire(timeout=seconds):
            raise DeadlineExceeded(f"weights are sent one version at a time, but one takes longer than {seconds:g} s")
        try:
            assert self.transport, "nothing is sent before open_transfers"
            yield self.transport
        finally:
            self.turn.release()

    def perturb(self, scale: float, seed: int) -> None:
        self.trainer.perturb(scale, seed)

    def restore(self) -> None:
        self.trainer.restore()

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self.trainer.logprobs(list(token_ids))

    def try_saving(self, folder: str) -> None:
        """Writes the folders of a checkpoint without weights to a place below `folder` that goes at once."""
        store = open_store(folder)
        with store.workspace("") as local, store.filling(local, folder):
            self.trainer.try_saving(local)

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Writes this rank's share of the whole state below `folder` of the store; what it wrote."""
        store = open_store(folder)
        with store.workspace("") as local:
            with store.filling(local, folder):
                self.trainer.save_state(local, step)
            return store.publish(local, "")

    def snapshot(self, step: int) -> None:
        self.trainer.snapshot(step)

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Writes this rank's share of the copy that `snapshot` made, in a thread beside the one that trains."""
        store = open_store(folder)
        with store.workspace("") as local:
            with store.filling(local, folder):
                self.trainer.write(local, step)
            return store.publish(local, "")

    def load(self, folder: str, names: Sequence[str], step: int) -> tuple[str, ...]:
        with open_store(folder).fetch("", names) as local:
            return self.trainer.load_state(local, step)

    def close(self) -> None:
        if hasattr(self, "trainer"):
            self.trainer.close()


class SupervisedModelActor(PolicyModelActor):
    """One rank of a supervised warm-up."""

    def _objective(self) -> "Objective":
        from grpo.algorithm.objective import SUPERVISED

        return SUPERVISED


def node_id() -> str:
    """Of the node that this process runs on, as Ray calls it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def free_address() -> tuple[str, int]:
    """This node's address, as Ray sees it, and a port that is free now."""
    return free_addresses(1)[0]


def free_addresses(count: int) -> list[tuple[str, int]]:
    """This node's address, as Ray sees it, with as many ports that are free now."""
    import ray

    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as probes:
        bound = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in bound:
            probe.bind(("", 0))
        return [(host, int(probe.getsockname()[1])) for probe in bound]
