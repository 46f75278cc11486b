"""The fenced process that calls the user's functions: JSON lines in and out, each reply with its request's number.

Says first {"missing": [fences that the kernel lacks]}, and ends if it may not go on without them; then of the imports
{"error": null} or {"error": "what, and the way out"}. Requests are {"id", "function": index, "prompt", "completion",
"answer"}; replies {"id", "reward": 1.0} or {"id", "kind": "exception", "error": "what happened"}.
"""

import ctypes
import difflib
import importlib
import inspect
import json
import math
import numbers
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypedDict

from grpo.rewards.sandbox import landlock, limits, seccomp

RewardFunction = Callable[[str, str, str], object]
LONGEST_ERROR = 2000
FENCED_IN = "reward code reads modules and what reward_code.readable names, and writes to $TMPDIR"
NICE = 10
"""Where the keeper is not asked, it must at least get its turn beside hundreds of processes."""
FENCES = {
    "landlock": "Landlock (Linux 5.13, and `landlock` in /sys/kernel/security/lsm)",
    "seccomp": "seccomp with a listener (Linux 5.5 on x86_64 or aarch64, not inside a sandbox that listens itself)",
    "proc_children": "/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)",
}
"""Each can be lacking; all are needed, as what one leaves open another closes."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


ROUNDS = 100
"""In which children are ended after a call; each generation of orphans needs one."""


class Settings(TypedDict):
    """What the caller asks for, as the supervisor reads it from its stdin."""

    functions: list[str]
    path: list[str]
    folder: str | None
    readable: list[str]
    scratch: str
    environment: dict[str, str]
    isolation: str
    network: bool
    memory_bytes: int
    requests: int
    replies: int


class Refused(Exception):
    """A function that cannot be used; the text is for the user."""


def run(settings: Settings, keeper: socket.socket) -> None:
    """Fences this process in, imports the functions and answers requests until their pipe ends."""
    requests, replies = settings["requests"], settings["replies"]
    missing = confine(settings, keeper)
    keeper.close()
    send(replies, {"missing": missing})
    if missing and settings["isolation"] != "none":
        return
    look_like_a_script(settings)
    try:
        functions = [load(name) for name in settings["functions"]]
    except Refused as error:
        send(replies, {"error": str(error)})
        return
    limits.limit_memory(settings["memory_bytes"])
    helpers = children()  # those that the imports started live on; what a call starts ends with it
    send(replies, {"error": None})
    with os.fdopen(requests) as lines:
        for line in lines:
            request = json.loads(line)
            reply = call(functions[request["function"]], request["prompt"], request["completion"], request["answer"])
            end_children(helpers)
            send(replies, {"id": request["id"], **reply})


def confine(settings: Settings, keeper: socket.socket) -> list[str]:
    """Puts up every fence; returns the names of those that this system does not have."""
    libc = ctypes.CDLL(None)
    os.setsid()
    limits.set_limits()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # when the keeper is killed
    if settings["isolation"] == "none":
        os.nice(NICE)
        return ["landlock", "seccomp"]
    missing = set()
    limits.drop_capabilities()
    libc.prctl(landlock.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        missing.add("proc_children")
    if landlock.abi():
        folders = [os.getcwd(), *settings["path"]]
        pythons = [os.path.join(home, name) for home in (sys.prefix, sys.base_prefix) for name in landlock.OF_PYTHON]
        readable = landlock.opened(folders, [*pythons, *settings["readable"]])
        landlock.restrict(readable, folders, settings["scratch"])
    else:
        missing.add("landlock")
    listener = seccomp.restrict(settings["network"])
    if listener is None:
        missing.add("seccomp")
    else:
        socket.send_fds(keeper, [b"."], [listener])
        os.close(listener)
    return [name for name in FENCES if name in missing]


def look_like_a_script(settings: Settings) -> None:
    """What user code finds: streams of its own, its variables, and the working folder before what is installed.

    But behind Python's own modules, which a file of the same name must not replace.
    """
    sys.dont_write_bytecode = True
    for fd, name in enumerate(("stdin", "stdout", "stderr")):  # not those of the keeper, which may have been files
        stream = os.fdopen(fd, "w" if fd else "r", buffering=1, errors="backslashreplace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.update(settings["environment"])
    time.tzset()
    installed = [place for place, entry in enumerate(sys.path) if entry.endswith("-packages")]
    place = min(installed, default=len(sys.path))
    sys.path[place:place] = filter(None, (settings["folder"], os.getcwd()))
    sys.path += [entry for entry in settings["path"] if entry not in sys.path]


def send(replies: int, message: Mapping[str, object]) -> None:
    """Writes one line of JSON, however little the pipe takes at a time."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(replies, data) :]


def load(name: str) -> RewardFunction:
    """Raises Refused if the module cannot be imported or has no such function, or if it does not take three texts."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise Refused(
            f"module {module_name!r} cannot be imported: {describe(error)}; put "
            f"{module_name.replace('.', '/')}.py into {os.getcwd()} or install it"
        ) from None
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise Refused(f"module {module_name!r} is one of Python's own; give your file another name")
    function: RewardFunction | None = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        nearest = difflib.get_close_matches(function_name, names, n=1)
        hint = f"did you mean {module_name}:{nearest[0]}?" if nearest else "check the spelling"
        raise Refused(f"module {module_name!r} has no function {function_name!r}; {hint}")
    try:
        inspect.signature(function).bind("prompt", "completion", "answer")
    except TypeError as error:
        raise Refused(
            f"a reward is called as (prompt, completion, answer), but {name}{inspect.signature(function)} does not "
            f"take that: {error}; change its parameters"
        ) from None
    except ValueError:  # no signature to look at, as for some functions written in C
        return function
    return function


def call(function: RewardFunction, prompt: str, completion: str, answer: str) -> dict[str, float | str]:
    """{"reward": a finite number} or {"kind", "error"}, whatever the function does short of ending this process."""
    try:
        reward = function(prompt, completion, answer)
    except MemoryError as error:
        return {"kind": "memory", "error": f"raised {describe(error)}"}
    except BaseException as error:
        return {"kind": "exception", "error": f"raised {describe(error)}"}
    try:
        if not isinstance(reward, numbers.Real):
            return {"kind": "bad_value", "error": f"returned {type(reward).__name__}"}
        value = float(reward)
    except BaseException as error:
        return {"kind": "bad_value", "error": f"returned something whose value raised {describe(error)}"}
    return {"reward": value} if math.isfinite(value) else {"kind": "bad_value", "error": f"returned {value}"}


def describe(error: BaseException) -> str:
    """Type and text of an error in one bounded line, also when its own __str__ fails; and the way out of a fence."""
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())[:LONGEST_ERROR]
    return f"{text} ({FENCED_IN})" if isinstance(error, PermissionError) else text


def children() -> set[int]:
    """Processes whose parent is this one: as it is a subreaper, also those that tried to get away by a double fork."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:  # it may end meanwhile
            found.update(map(int, file.read().split()))
    return found


def end_children(spared: set[int]) -> None:
    """Ends all children but these, and theirs: orphans come to this process and are found in the next round.

    Where threads of the user's go on making some, the keeper finds what is left, and has this process replaced.
    """
    for _ in range(ROUNDS):
        left = children() - spared
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):  # reaped meanwhile by the user's thread
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
