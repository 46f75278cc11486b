"""Threads that must not end before they are told to: what they raise is said, and they go on. Threads that give way."""

import os
import sys
import threading
from collections.abc import Callable

PAUSE_SECONDS = 0.2
"""Before work that has failed is taken up again."""
POLITE = 5
"""Steps down the ladder of priorities (nice)."""


def start_lasting(name: str, work: Callable[[], object], ended: threading.Event) -> threading.Thread:
    """A daemon thread that does `work` until it returns, again and again where it raises, unless `ended` is set.

    What it raises is said once for each text: no memory, no descriptor, no thread, or a mistake of ours.
    """
    thread = threading.Thread(target=_last, args=(name, work, ended), name=name, daemon=True)
    thread.start()
    return thread


def give_way() -> None:
    """From now on the calling thread, and what it starts, leaves the cores to others of the machine that want them.

    On a CPU a step that shares its cores with a thread of equal rank takes three times as long: its own threads wait
    for each other. More than POLITE would starve the thread for minutes.
    """
    if sys.platform == "linux":  # elsewhere only whole processes have a rank
        usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, usual + POLITE))


def _last(name: str, work: Callable[[], object], ended: threading.Event) -> None:
    said: set[str] = set()
    while not ended.is_set():
        try:
            work()
            return
        except BaseException as error:  # whatever it is: without this thread the run is lost
            if not ended.is_set():  # else it is how the work was woken up
                _say(name, error, said)
        ended.wait(PAUSE_SECONDS)


def _say(name: str, error: BaseException, said: set[str]) -> None:
    try:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if text not in said and len(said) < 100:
            said.add(text)
            print(f"warning: the thread {name} goes on after {text}", file=sys.stderr, flush=True)
    except Exception:  # nobody reads it, or there is no memory for it: still no reason to end
        return
