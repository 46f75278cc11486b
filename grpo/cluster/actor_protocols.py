"""What `handles.py` calls in an actor: VLLMActor and PolicyModelActor fulfil it; other classes may stand behind it."""

from collections.abc import Sequence
from typing import Protocol

from grpo.config import Config
from grpo.interfaces import Place, Transfer
from grpo.types import FileRecord, Group, Manifest, Prompt, Sample, Sampling, Stats, TensorRecord


class EngineActor(Protocol):
    """What an actor with an engine in it does; see `interfaces.Engine` for each verb. All are coroutines."""

    def __init__(self, config: Config, index: int, device: str) -> None: ...

    async def start(self) -> Place:
        """Loads the model and meets the other ranks."""
        ...

    async def ping(self, seconds: float) -> None:
        """A sign of life of its process, beside whatever it is doing."""
        ...

    async def health(self, seconds: float) -> str:
        """A sign of life of the engine: it makes a token, or is busy and says so."""
        ...

    async def generate(self, requests: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        """G samples of each prompt, in order; a request is a prompt and the seed of its first sample."""
        ...

    async def abandon(self) -> None:
        """Drops all that `generate` is sampling."""
        ...

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens 1..T-1 at temperature 1, under the weights that were received last."""
        ...

    async def join_transfer(self, transfer: Transfer, place: int) -> None:
        """Leaves the transfer before and joins this one; its first receiver has this place."""
        ...

    async def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> list[Manifest]:
        """Takes the announced tensors; what each receiver took."""
        ...

    async def commit_weights(self, version: int, in_flight: bool = False) -> float:
        """From now on it samples from these weights; the seconds that it stood still for that."""
        ...

    async def rest(self) -> None:
        """Gives the GPU memory of its weights and cache back until others are received and committed."""
        ...

    async def close(self) -> None:
        """Ends it in order."""
        ...


class RankActor(Protocol):
    """What an actor with a trainer rank in it does; see `interfaces.TrainerRank` for each verb."""

    def __init__(self, config: Config, rank: int, device: str) -> None: ...

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous."""
        ...

    def start(self, host: str, port: int) -> Place:
        """Loads the model and meets the other ranks."""
        ...

    def ping(self, seconds: float) -> None:
        """A sign of life of its process, beside whatever it is doing."""
        ...

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """All updates of a step."""
        ...

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        """The loss of these rows; nothing is learned."""
        ...

    def save(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Writes its share of the whole state below a folder of the store; what it wrote."""
        ...

    def snapshot(self, step: int) -> None:
        """Copies its share of the whole state to the host, as it is after that step."""
        ...

    def write(self, folder: str, step: int) -> tuple[FileRecord, ...]:
        """Beside the verbs that train: writes the copy of that step below a folder of the store; what it wrote."""
        ...

    def try_saving(self, folder: str) -> None:
        """Writes what can be refused of a policy, below a folder of the store; nothing stays there."""
        ...

    def load(self, folder: str, names: Sequence[str], step: int) -> tuple[str, ...]:
        """Takes over what all ranks of that time have saved; lines for a person."""
        ...

    def records(self) -> tuple[TensorRecord, ...]:
        """Names, shapes and dtypes of the weights, in the order of sending."""
        ...

    def tolerance(self) -> float:
        """Mean difference of logprobs, in nats, that an engine with the same weights may have."""
        ...

    def offer_transfers(self, lanes: int, near: bool) -> tuple[str, ...]:
        """Rank 0: where engines may meet it; as in `TrainerRank`."""
        ...

    def open_transfers(self, transfers: tuple[Transfer, ...]) -> None:
        """Rank 0: joins the transfers that it has offered, as their sender; those before are left."""
        ...

    def send_weights(self, version: int) -> Manifest | None:
        """Sends every tensor; None on the ranks that only help to gather them."""
        ...

    def publish(self, version: int, oldest: int) -> float:
        """Rank 0 keeps a copy of the weights as `version` and forgets those below `oldest`; bytes of all its copies."""
        ...

    def send_published(self, version: int) -> Manifest:
        """Rank 0, beside the verbs that train: sends a version that it has published."""
        ...

    def perturb(self, scale: float, seed: int) -> None:
        """Adds noise of `scale` times each tensor's root mean square, the same on all ranks, until `restore`."""
        ...

    def restore(self) -> None:
        """Undoes `perturb`, bit for bit."""
        ...

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens 1..T-1 at temperature 1, under the live weights."""
        ...

    def close(self) -> None:
        """Ends it in order."""
        ...
