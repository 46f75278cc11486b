"""Runs a function as several ranks: processes forked from a server that has imported torch and deepspeed once."""

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 400) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returned, by rank. A failure of any rank fails the test."""
    results = CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=_run, args=(results, function, rank, world_size, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        answers = dict(_answer(results, timeout) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
            process.join()
    return [answers[rank] for rank in range(world_size)]


def _run(results: Any, function: Callable[..., Any], rank: int, world_size: int, arguments: tuple[Any, ...]) -> None:
    try:
        results.put((rank, function(rank, world_size, *arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def _answer(results: Any, timeout: float) -> tuple[int, Any]:
    try:
        rank, answer, failure = results.get(timeout=timeout)
    except queue.Empty:
        raise AssertionError(f"a rank did not answer within {timeout} s") from None
    assert failure is None, f"rank {rank}:\n{failure}"
    return rank, answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def stop_server() -> None:
    """Ends the fork server, if it runs, so that no process is left when the tests are over."""
    forkserver._forkserver._stop()
