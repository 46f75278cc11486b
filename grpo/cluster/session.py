"""A Ray session: start or connect, wait with deadlines, place by role, and leave no process behind."""

import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError, Interrupted

SIGNAL_SECONDS = 0.5  # that Ctrl-C may wait
GRACE_SECONDS = 10.0  # for an actor to end by itself before it is killed
Actor = Any  # ray's ActorHandle: its methods are made at run time, so no checker can know them
OTHER_ROLE = {"rollout": "trainer", "trainer": "rollout"}


class Session:
    """The actors of one run. Use `session(config)`, which also ends what it started."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = "cpu"
        self._actors: list[Actor] = []
        self._processes: list[psutil.Process] = []

    def start(self) -> None:
        """Connects to `cluster.address` or starts Ray on this machine with as many CPUs as the actors reserve."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address, actors = self.config.cluster.address, self.config.rollout.engines + self.config.train.ranks
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                # Its ports are open to every user of this machine: a token of its own, not kept in the home folder.
                raylet: Any = ray._raylet
                os.environ["RAY_AUTH_MODE"] = "token"
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets everything else go first
                raylet.Config.initialize("")  # ray reads the mode once, at import
                ray.init(num_cpus=max(actors, os.cpu_count() or 1), include_dashboard=False, **quiet)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            where = f"the cluster at {address!r}" if address else "a local cluster"
            raise ClusterError(f"Ray cannot reach {where}: {error}; check cluster.address") from error
        has_gpus = resources().get("GPU", 0) > 0
        wanted = self.config.cluster.device
        self.device = wanted if wanted != "auto" else "cuda" if has_gpus else "cpu"
        if self.device == "cuda" and not has_gpus:
            raise ConfigError("cluster.device is cuda, but Ray sees no GPU; set cluster.device to cpu or auto")

    def create(self, actor_class: type, role: str, gpus: float, *args: object) -> Actor:
        """An actor on a node of its role: one whose label `cluster.role_label` is not the other role's.

        Nothing retries a method (a second optimizer step would be silent), and a dead actor stays dead.
        """
        options = {
            "num_cpus": 1,
            "num_gpus": gpus if self.device == "cuda" else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "label_selector": {self.config.cluster.role_label: f"!in({OTHER_ROLE[role]})"},
        }
        actor: Actor = ray.remote(actor_class).options(**options).remote(*args)
        self._actors.append(actor)
        return actor

    def watch(self, pids: Sequence[int]) -> None:
        """Remembers processes of this machine that must be gone when the session ends."""
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._processes.append(psutil.Process(pid))

    def stop(self) -> None:
        """Asks every actor to close, kills those that do not, and waits until their processes are gone."""
        if not ray.is_initialized():
            return
        closing = [actor.close.remote() for actor in self._actors]
        with contextlib.suppress(RayError):
            ray.wait(closing, num_returns=len(closing), timeout=GRACE_SECONDS)
        for process in list(self._processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._processes += process.children(recursive=True)
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        for process in psutil.wait_procs(self._processes, timeout=GRACE_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._actors = []
        ray.shutdown()

    def get(self, refs: Sequence[Any], seconds: float, what: str) -> list[Any]:
        """The results in order, within `seconds`.

        Raises: DeadlineExceeded naming `what`; ClusterError if an actor died; the GrpoError that an actor raised.
        """
        deadline = time.monotonic() + seconds
        pending = list(refs)
        try:
            while pending:  # the first failure is reported at once, not after its slower siblings
                # in slices: ray.wait looks at signals only when it returns
                left = deadline - time.monotonic()
                done, pending = ray.wait(pending, num_returns=1, timeout=min(max(left, 0.0), SIGNAL_SECONDS))
                if not done and left <= 0:
                    raise DeadlineExceeded(
                        f"{what} must end within {seconds:g} s (deadlines.*), but {len(pending)} of {len(refs)} actors "
                        f"have not answered; raise the deadline or look at their logs in {log_folder()}"
                    )
                ray.get(done)
            return list(ray.get(list(refs)))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, GrpoError):
                raise cause from None
            raise ClusterError(f"{what}: an actor failed: {last_line(error)}; logs are in {log_folder()}") from error
        except RayActorError as error:
            raise ClusterError(f"{what}: an actor died: {last_line(error)}; logs are in {log_folder()}") from error


def resources() -> dict[str, float]:
    """All that the cluster's nodes offer."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def log_folder() -> str:
    """Where Ray writes the actors' output."""
    node: Any = ray._private.worker.global_worker.node
    return str(node.get_logs_dir_path())


def last_line(error: BaseException) -> str:
    """The line that says what happened: Ray puts a traceback before it and a list of guesses behind."""
    lines = [line.strip() for line in str(error).partition("Some common causes")[0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def session(config: Config) -> Iterator[Session]:
    """A started session that is stopped on success, error, Ctrl-C and SIGTERM."""
    current = Session(config)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        current.start()
        for number in handlers:  # after ray.init, which installs its own
            signal.signal(number, interrupt)
        yield current
    except SystemError as error:  # how a waiting ray.get or ray.wait reports what a signal handler raised
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise
    finally:
        for number in handlers:  # a second Ctrl-C must not cut the clean-up short
            signal.signal(number, signal.SIG_IGN)
        try:
            current.stop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; the last saved policy is whole")
