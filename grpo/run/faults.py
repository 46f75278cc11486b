"""Named places where a test may kill, freeze or break the process that passes them, or another role's process.

Without GRPO_FAULTS in the environment a fault point does nothing. With it, `make chaos` and the tests say what happens:

    GRPO_FAULTS="save.rename@6:kill; generate.dispatched@3:stop=engine_core; train.optimizer@4/1:kill"
                 point@step[/rank]:action[=role[/place]]

Actions: kill (SIGKILL), stop (SIGSTOP), raise (OSError). Without a role they hit the process that passes the point,
with one all processes of the role, or only that in one place. GRPO_FAULT_DIR is a folder: `pids.json` maps a role to
pids of this machine (`publish_pids`), a fault that has struck leaves the file `struck_name(spec)`, holding the time (or
nothing, if there was no such process), and never strikes again.
"""

import json
import os
import signal
import time
from pathlib import Path

POINTS = {
    "resume.found": "controller: a checkpoint was chosen and verified",
    "resume.loaded": "trainer rank: its state was read from the checkpoint",
    "resume.restored": "controller: trainer, data order and metrics are those of the checkpoint",
    "generate.dispatched": "controller: the step's prompts are with the engines",
    "rollout.ended": "controller: all samples are back",
    "reward.began": "controller: the samples are about to be scored",
    "reward.ended": "controller: all rewards are known",
    "train.dispatched": "controller: the batch is with the trainer ranks",
    "train.forward": "trainer rank: before the first forward pass of a step",
    "train.optimizer": "trainer rank: gradients are complete, the optimizer has not moved",
    "train.stepped": "trainer rank: all updates of the step are made",
    "sync.dispatched": "controller: weights are travelling",
    "sync.tensor": "trainer rank 0: some tensors are sent, others not",
    "sync.received": "controller: every engine has the weights, none has committed them",
    "sync.done": "controller: every engine samples from the new weights",
    "save.begin": "controller: the temporary folder exists",
    "save.files": "trainer rank: its files are written, not yet flushed",
    "save.written": "controller: every rank has written, there is no manifest",
    "save.manifest": "controller: the manifest is written, the folder has its temporary name",
    "save.renamed": "controller: the folder has its final name, the pointer names the one before",
    "save.pointer": "controller: the pointer names the new checkpoint, nothing is pruned",
    "save.done": "controller: older checkpoints are pruned",
}
"""Every fault point and who passes it. A test asserts that the code passes exactly these."""

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def fault_point(name: str, step: int, rank: int = 0) -> None:
    """Does nothing, or what GRPO_FAULTS says of this place. Raises OSError for the action `raise`."""
    plan = os.environ.get("GRPO_FAULTS")
    if not plan:
        return
    assert name in POINTS, f"{name} is not in POINTS"
    for spec in filter(None, map(str.strip, plan.split(";"))):
        place, _, action = spec.partition(":")
        if place in (f"{name}@{step}", f"{name}@{step}/{rank}") and _strikes(spec):
            _act(spec, *action.partition("=")[::2])


def phase_point(phase: str, edge: str, step: int) -> None:
    """The fault point at the beginning or end of a phase of the loop ("began", "ended"), where there is one."""
    if f"{phase}.{edge}" in POINTS:
        fault_point(f"{phase}.{edge}", step)


def publish_pids(role: str, pids: list[int]) -> None:
    """Tells fault points of other processes which processes play a role now. Does nothing outside of such tests."""
    folder = os.environ.get("GRPO_FAULT_DIR")
    if not folder:
        return
    path = Path(folder, "pids.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    path.with_suffix(".tmp").write_text(json.dumps(known | {role: pids}))
    path.with_suffix(".tmp").replace(path)


def struck_name(spec: str) -> str:
    """Name of the file that a fault leaves."""
    return "struck-" + "".join(char if char.isalnum() or char in "@.=" else "_" for char in spec)


def _strikes(spec: str) -> bool:
    """True the first time that any process asks for this fault."""
    try:
        with open(Path(os.environ["GRPO_FAULT_DIR"], struck_name(spec)), "x") as file:
            file.write(repr(time.time()))
    except FileExistsError:
        return False
    return True


def _act(spec: str, action: str, role: str) -> None:
    if action == "raise":
        raise OSError(f"fault point: {role or 'injected'}")
    folder = Path(os.environ["GRPO_FAULT_DIR"])
    role, _, place = role.partition("/")
    pids = json.loads((folder / "pids.json").read_text())[role] if role else [os.getpid()]
    for pid in [pids[int(place) % len(pids)]] if place else pids:
        try:
            os.kill(pid, SIGNALS[action])
        except ProcessLookupError:
            (folder / struck_name(spec)).write_text("")
