"""The connection to one vLLM engine core: starts it, calls it within deadlines, tells whether it works, ends it.

The core is a child process. It answers calls between two steps; when it dies or freezes, that is an EngineLost here.
"""

import asyncio
import contextlib
import gc
import os
import shutil
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil

from grpo.config import Config
from grpo.config.architecture import check_model_config
from grpo.data.generation import load_generation_config
from grpo.errors import ClusterError, EngineLost
from grpo.rollout.environment import SOCKETS, may_fork, prepare_environment
from grpo.rollout.notes import Notes
from grpo.run.failures import ElsewhereError, Failure, Kind, look
from grpo.run.memory import host_memory, oom_kills
from grpo.run.start import Phases

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

SHUTDOWN_SECONDS = 3.0
LOOK_SECONDS = 0.5  # between two looks at whether the core that owes an answer is alive
HALTED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
Answer = TypeVar("Answer")


class EngineCore:
    """One core on `device` ("cpu" or "cuda"). `start` builds it; all verbs belong to the event loop it ran on.

    `metrics` is `ray.util.metrics` where vLLM's own metrics are wanted; `phases` are told what its start is at;
    `together` engines share the cores of this machine.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        device: str,
        metrics: ModuleType | None = None,
        phases: Phases | None = None,
        together: int = 1,
    ) -> None:
        self.config, self.index, self.device, self.metrics = config, index, device, metrics
        self.together = together
        self.phases = phases or Phases("imports")
        self.requests = 0
        self.start_notes: tuple[str, ...] = ()  # what a person should know of the start
        self.salt: str | None = None  # of the prefix cache
        self.stale: str | None = None  # why the model is in pieces: nothing may be generated from it
        self.asleep: Literal["", "cache", "all"] = ""  # what of its GPU memory it has given away
        self.exclusive = 0  # transfers and commits under way: nothing else may be asked of the core
        self.failure: Failure | None = None  # that ended the core
        self.probe: asyncio.Task[object] | None = None  # the health check's request

    async def start(self) -> None:
        """Loads vLLM, starts the engine core and lets it load the model.

        Raises: ConfigError if the model cannot be used; what a library raises, as it is; ElsewhereError with what
        failed in the core's process.
        """
        check_model_config(self.config, self.device)
        fork = may_fork()
        prepare_environment(self.config, self.device, self.together)
        gc.disable()  # these imports make so many objects that looking for garbage among them is a tenth of the time
        from grpo.rollout import build
        from grpo.rollout.vllm_private import SPAWNED

        gc.freeze()
        gc.enable()
        self.build = build
        load_generation_config(self.config)
        self.notes = Notes()
        self.phases.begin("core")
        killed = oom_kills()
        try:
            self.llm = self._start_core(fork)
        except (Exception, SystemExit) as error:
            if oom_kills() > killed:
                raise ElsewhereError(
                    Failure(Kind.MEMORY, f"the kernel ended it (oom-kill); {host_memory()}")
                ) from error
            noted = self.notes.take()
            self.notes.close()
            if noted:
                raise ElsewhereError(noted) from error
            raise
        self.start_notes += tuple(f"note: engine {self.index} loads vLLM twice: {why}" for why in SPAWNED)
        self.processes = psutil.Process().children(recursive=True)
        workers: list[dict[str, float]] = await self.on_workers("start_seconds")
        self.phases.begin("tokenizer")
        self.phases.split("core", max(workers, key=lambda seconds: sum(seconds.values())))

    def _start_core(self, fork: bool) -> "AsyncLLM":
        """The watchdog of a core removes the folder of its sockets; for one that does not come up it is done here."""
        try:
            return self.build.start_engine(self.config, self.device, fork, self.metrics)
        except BaseException:
            shutil.rmtree(os.environ[SOCKETS], ignore_errors=True)
            raise

    def pids(self) -> list[int]:
        """Pids of the processes that the engine started, the engine core's first."""
        children = psutil.Process().children(recursive=True)
        return [child.pid for child in sorted(children, key=is_core, reverse=True)]

    async def complete(self, token_ids: Sequence[int], params: "SamplingParams") -> "RequestOutput":
        """vLLM's own answer to one request, unchecked and without a deadline."""
        self.requests += 1
        outputs = self.llm.generate(self.build.tokens(token_ids, self.salt), params, str(self.requests))
        return [output async for output in outputs][-1]

    async def health(self, seconds: float) -> Literal["ok", "busy"]:
        """Whether the engine still works, found out by letting it generate a token and, beside it, answer a call.

        "ok": the token came, whatever weights are loaded, committed or not. "busy": only the call was answered within
        `seconds` (KV memory is full; or it rests or is stale, and nothing may be generated); or weights are travelling,
        when the core answers nobody: then all its processes run, and `deadlines.sync` judges it. Samples do not notice:
        one place of the batch is kept for the token, which shares no cache. Raises: EngineLost.
        """
        probing = self.probe is not None and not self.probe.done()
        token = None
        if not (self.exclusive or self.stale or self.asleep or probing):
            token = self.probe = asyncio.create_task(self.complete([0], self.build.probe_params()))
        ping = asyncio.create_task(self.answer(self.llm.collective_rpc("ping")))
        async with self.lost("a health check"):
            try:
                await asyncio.wait([token or ping], timeout=seconds)
                if token is not None and token.done():
                    token.result()
                    return "ok"
                if ping.done():
                    ping.result()
                    return "busy"
            finally:
                ping.cancel()
                if token is not None:
                    token.cancel()
        if token is None and self.exclusive and all(is_running(process) for process in self.processes):
            return "busy"
        raise EngineLost(
            f"an engine must answer within {seconds:g} s, but engine {self.index} made no token and took no call; "
            "it is frozen"
        )

    async def shutdown(self) -> None:
        """Ends the engine core and its workers, by force if they do not go by themselves."""
        children = psutil.Process().children(recursive=True)
        if hasattr(self, "llm"):
            self.llm.shutdown(timeout=SHUTDOWN_SECONDS)
            self.notes.close()
        for child in psutil.wait_procs(children, timeout=SHUTDOWN_SECONDS)[1]:
            child.kill()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keeps health checks away and waits for the one that is under way; all within `deadlines.sync`."""
        self.exclusive += 1
        try:
            async with self.deadline("weight sync", self.config.deadlines.sync):
                if self.probe is not None:
                    await asyncio.wait([self.probe])
                yield
        finally:
            self.exclusive -= 1

    async def on_workers(self, verb: str, *args: object) -> list[Any]:
        """One of the verbs of `receiver.py` on every worker of the engine."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self.answer(self.llm.collective_rpc(verb, args=args))
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM hands over a worker's exception as a text in a bare Exception
            failure = self.notes.take() or look(error)
            if failure.lost:
                raise ClusterError(f"engine {self.index}, {verb}: {failure.text}") from error
            raise ElsewhereError(failure) from error

    async def answer(self, call: Coroutine[object, None, Answer]) -> Answer:
        """What the core answers. Left alone, vLLM waits for ever for the answer of a core that has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.create_task(call)
        try:
            while not (await asyncio.wait([task], timeout=LOOK_SECONDS))[0]:
                if self.llm.errored:
                    raise EngineDeadError()
            return task.result()
        finally:
            task.cancel()

    @asynccontextmanager
    async def deadline(self, phase: str, seconds: float) -> AsyncIterator[None]:
        """Turns a wait that takes too long and the death of the engine core into our own errors."""
        try:
            async with self.lost(phase), asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise EngineLost(
                f"{phase} must end within {seconds:g} s (deadlines.*), but engine {self.index} has not answered; raise "
                "the deadline or look at its log"
            ) from error

    @asynccontextmanager
    async def lost(self, phase: str) -> AsyncIterator[None]:
        """Turns the death of the engine core into our own errors."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self.failure = self.notes.take() or self.failure  # several calls may fail by it
            if self.failure and not self.failure.lost:
                raise ElsewhereError(self.failure) from error
            raise EngineLost(f"engine {self.index} died during {phase}: {error}; its log says why") from error


def is_running(process: psutil.Process) -> bool:
    """False for a process that is gone or stopped."""
    try:
        return process.status() not in HALTED
    except psutil.NoSuchProcess:
        return False


def is_core(process: psutil.Process) -> bool:
    """Beside the core there are helpers of multiprocessing; vLLM gives the core a title."""
    with contextlib.suppress(psutil.Error):
        return "EngineCore" in "".join(process.cmdline())
    return False
