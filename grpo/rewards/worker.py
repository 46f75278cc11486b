"""The child process that runs the user's reward functions: JSON lines in and out. Run as a file, standard library only.

First line: {"functions": ["module:function", …]}; answer {"error": null} or {"error": "what, and the way out"}.
Then lines {"function": index, "prompt", "completion", "answer"}; answer {"reward": 1.0} or {"error": "what happened"}.
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
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

RewardFunction = Callable[[str, str, str], Any]
LONGEST_ERROR = 2000
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """A function that cannot be used; the text is for the user."""


def main() -> None:
    requests, replies = take_pipes()
    if sys.platform == "linux":  # a parent that is killed takes this process along, even when user code hangs
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    names = json.loads(requests.readline())["functions"]
    sys.path.insert(0, os.getcwd())
    try:
        functions = [load(name) for name in names]
    except Refused as error:
        send(replies, {"error": str(error)})
        return
    send(replies, {"error": None})
    for line in requests:
        request = json.loads(line)
        send(replies, call(functions[request["function"]], request["prompt"], request["completion"], request["answer"]))


def take_pipes() -> tuple[TextIO, TextIO]:
    """The two ends of the protocol; what user code prints goes to stderr and what it reads is empty."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


def send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


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


def call(function: RewardFunction, prompt: str, completion: str, answer: str) -> dict[str, Any]:
    try:
        reward = function(prompt, completion, answer)
        if not isinstance(reward, numbers.Real):
            return {"error": f"returned {type(reward).__name__}"}
        value = float(reward)
    except (Exception, SystemExit) as error:
        return {"error": f"raised {describe(error)}"}
    return {"reward": value} if math.isfinite(value) else {"error": f"returned {value}"}


def describe(error: BaseException) -> str:
    """Type and text of an error in one bounded line, also when its own __str__ fails."""
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    return text[:LONGEST_ERROR]


if __name__ == "__main__":
    main()
