"""The command `grpo`, and `python -m grpo`: an interpreter about which neither shell nor working folder decides."""

import os
import sys

HARMLESS = {
    "PYTHONDONTWRITEBYTECODE": "-B",
    "PYTHONNOUSERSITE": "-s",
    "PYTHONUNBUFFERED": "-u",
    "PYTHONPYCACHEPREFIX": "",
    "PYTHONHOME": "",
    "PYTHONUSERBASE": "",
}
"""Variables of Python that change nothing that is computed, and the flag that says the same."""

AGAIN = """import sys
sys.path.insert(0, sys.argv.pop(1))
import grpo.run.shell
del sys.path[0]
sys.path += grpo.run.shell.module_folders()
import grpo.cli
sys.argv[0] = "grpo"
grpo.cli.main()"""
"""Runs the command line of this very package, which may lie elsewhere than an installed one; nothing beside it.

What PYTHONPATH names is searched last: packages are found there, and none takes the place of an installed one."""


def main() -> None:
    """Starts the interpreter again, in this same process, where it would do other than what the configuration says.

    That is: modules of the working folder or of PYTHONPATH come before the libraries', a variable of Python changes a
    mode (asserts, encodings, hashes), or text is not UTF-8.
    """
    keep_screen_numbers()
    if sys.executable and is_foreign():
        again = [sys.executable, *flags(), "-c", AGAIN, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
        try:  # noqa: SIM105 - contextlib may be a module of the working folder
            os.execv(sys.executable, [*again, *sys.argv[1:]])
        except OSError:  # where it may not be started a second time, this one has to do
            pass
    from grpo.cli import main as run

    run()


def is_foreign() -> bool:
    """Whether this interpreter is one that the shell has changed."""
    try:
        here = bool(sys.path) and os.path.realpath(sys.path[0] or ".") == os.path.realpath(".")
    except FileNotFoundError:  # the working folder is gone; the command line says so
        here = False
    named = any(name.startswith("PYTHON") and name not in HARMLESS for name in os.environ)
    text = sys.getfilesystemencoding().lower().replace("-", "") != "utf8"
    return here or named or text or sys.flags.optimize > 0


def flags() -> list[str]:
    """Of an interpreter that heeds no variables, save those that say where Python's own parts are."""
    kept = [flag for name, flag in HARMLESS.items() if flag and os.environ.get(name)]
    own = any(os.environ.get(name) for name in ("PYTHONHOME", "PYTHONUSERBASE"))
    return ["-P", "-X", "utf8", *kept, *([] if own else ["-E"])]


def keep_screen_numbers() -> None:
    """Opens the standard streams that the shell has closed: the next file to be opened would take their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


if __name__ == "__main__":
    main()
