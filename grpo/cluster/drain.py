"""`grpo drain`: a pod, or this machine, is about to go away; what runs here ends in order before it does.

Beside the driver that means SIGTERM to it, which commits. In a pod of workers it means to tell Ray that the node
drains: the driver sees that, commits at the end of its step if ranks are here, and builds elsewhere what runs here.
"""

import asyncio
import socket
import time
from pathlib import Path

import psutil
from ray.exceptions import RayError, RpcError

from grpo.cluster.ray_private import ALIVE, PREEMPTION, HeadClient, bootstrap_address, head_client
from grpo.config import Config
from grpo.errors import ClusterError
from grpo.run.attempts import Holder, holder_here

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 5.0
"""Longest wait for one answer of Ray's head."""


def drain(config: Config | None, seconds: float) -> str:
    """Ends what runs here within `seconds`; returns a sentence on what was done. Beside workers no `config` is needed.

    Raises: ClusterError if the time was not enough or Ray's head does not answer.
    """
    deadline = time.monotonic() + seconds
    holder = holder_here(Path(config.run.dir)) if config else None
    if holder:
        return stop_driver(holder, deadline)
    if config and config.cluster.address is None:
        return f"nothing to drain: no start of {config.run.dir} runs on this machine"
    return RayNode(config.cluster.address if config else None).leave(deadline)


def stop_driver(holder: Holder, deadline: float) -> str:
    """SIGTERM to the driver, then waits for its end: it commits, and ends its actors."""
    name = f"attempt {holder.attempt} (process {holder.process.pid})"
    try:
        holder.process.terminate()
    except psutil.NoSuchProcess:
        return f"{name} has just ended"
    except psutil.AccessDenied as error:
        raise ClusterError(f"{name} belongs to another user; drain it as that user") from error
    while not holder.ended:
        if time.monotonic() > deadline:
            raise ClusterError(f"{name} must end in time, but it is still there; raise --seconds and run.grace_seconds")
        time.sleep(LOOK_SECONDS)
    return f"{name} was told to stop and has ended"


class RayNode:
    """The node of a Ray cluster that runs in this pod. `address` is the cluster's; None or "auto": what Ray knows here.

    It talks to Ray's head alone and does not join the cluster: a process that joins is one more to end.
    """

    def __init__(self, address: str | None, host: str | None = None) -> None:
        self.address = bootstrap_address(address or "auto")
        self.host = host or socket.gethostname()

    def leave(self, deadline: float) -> str:
        """Marks the node as draining and waits until no actor is left on it. Raises ClusterError."""
        if self.address is None:
            return "nothing to drain: Ray does not run here"
        try:
            head = connect(self.address)
            node_id = self._find(head)
            if node_id is None:
                return f"nothing to drain: {self.host} is no node of workers of the cluster at {self.address}"
            until = (time.time() + deadline - time.monotonic()) * 1000
            head.drain_node(node_id, PREEMPTION, "grpo drain", int(until), timeout=ANSWER_SECONDS)
        except (RayError, RuntimeError, OSError) as error:
            raise ClusterError(f"Ray's head at {self.address} must answer, but: {error}") from error
        return self._wait(head, node_id, deadline)

    def _find(self, head: HeadClient) -> str | None:
        """The id of this host's living node, unless it is the head, where no actor may be."""
        nodes = head.get_all_node_info(timeout=ANSWER_SECONDS).values()
        own = [node for node in nodes if node.node_manager_hostname == self.host and node.state == ALIVE]
        return own[0].node_id.hex() if own and not own[0].is_head_node else None

    def _wait(self, head: HeadClient, node_id: str, deadline: float) -> str:
        while True:
            try:
                left = asyncio.run(actors_on(head, node_id))
            except (RpcError, RuntimeError):
                return f"{self.host} is drained: Ray's head has ended, and the run with it"
            if not left:
                return f"{self.host} is drained: no actor is left on it"
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.host} must be drained in time, but {', '.join(left)} has not left it")
            time.sleep(LOOK_SECONDS)


def connect(address: str) -> HeadClient:
    """A client of Ray's head, which alone would wait 40 s for one that is gone. Raises OSError, RayError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    return head_client(address)


async def actors_on(head: HeadClient, node_id: str) -> list[str]:
    """Class names of the actors that are alive on a node."""
    table = await head.async_get_all_actor_info(actor_state_name="ALIVE", timeout=ANSWER_SECONDS)
    return sorted(actor.class_name for actor in table.values() if actor.address.node_id.hex() == node_id)
