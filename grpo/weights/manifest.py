"""Comparison of what was sent with what every engine worker received. Pure: no torch.

A version label or an answer without error proves nothing about the weights an engine holds, so both sides write down
what they touched, name by name, and only equal manifests make a version.
"""

from collections import Counter
from collections.abc import Sequence

from grpo.errors import WeightSyncError
from grpo.types import Manifest, TensorRecord

NAMED = 5
"""Number of differences that an error message spells out."""


def verify(
    sent: Manifest, received: Sequence[Manifest], previous: Manifest | None = None, updated: bool = False
) -> None:
    """Checks that every worker received exactly what was sent: version, names, shapes, dtypes and digests.

    `previous` is what the last sync sent. `updated` says that the policy was trained since (an update with a learning
    rate and a gradient that are not zero was made): then the two must differ, else old weights were sent.
    Raises: WeightSyncError naming the worker, the tensors and what differs.
    """
    if not received:
        raise WeightSyncError(
            "a sync needs at least one worker that received the weights, but none answered; check the engines"
        )
    if not sent.records:
        raise WeightSyncError(
            f"a sync must send weights, but version {sent.version} holds no tensor; check the model's parameters"
        )
    problems = [f"sent {problem}" for problem in unsound(sent.records)]
    if previous is not None:
        problems += unlike(sent, previous)
        if updated and sent.records == previous.records:
            problems.append(f"the trainer has moved, but sent the weights of version {previous.version} again")
    for worker, manifest in enumerate(received):  # each must equal what was sent, so all are alike
        problems += [f"worker {worker}: {problem}" for problem in differences(sent, manifest)]
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise WeightSyncError(
            f"every engine must hold the trainer's weights, but after the sync of version {sent.version}: "
            f"{'; '.join(problems[:NAMED])}{more}; nothing was sampled from them, start the run again"
        )


def differences(sent: Manifest, received: Manifest) -> list[str]:
    """One line for each tensor (and for the version) that differs."""
    problems = []
    if received.version != sent.version:
        problems.append(f"version {received.version} instead of {sent.version}")
    problems += [problem for problem in unsound(received.records) if problem not in unsound(sent.records)]
    wanted = {record.name: record for record in sent.records}
    found = {record.name: record for record in received.records}
    problems += [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} was never sent" for name in found if name not in wanted]
    for name, record in wanted.items():
        if name in found and found[name] != record:
            problems.append(f"{name} differs in {_first_difference(record, found[name])}")
    return problems


def unlike(sent: Manifest, previous: Manifest) -> list[str]:
    """One sync moves the same tensors, and as many bytes, as the other."""
    outline, before = ([(record.name, record.nbytes) for record in item.records] for item in (sent, previous))
    if outline == before:
        return []
    return [f"sent {total(outline)}, but version {previous.version} was {total(before)}"]


def total(outline: list[tuple[str, int]]) -> str:
    """How much a sync moved, in words."""
    return f"{len(outline)} tensors with {sum(size for _, size in outline)} bytes"


def unsound(records: Sequence[TensorRecord]) -> list[str]:
    """Tensors that prove nothing: without elements, without digest, or sent twice under one name."""
    problems = [f"{record.name} is empty" for record in records if record.numel == 0]
    problems += [f"{record.name} has no digest" for record in records if not record.digest]
    counts = Counter(record.name for record in records)
    problems += [f"{name} appears {count} times" for name, count in counts.items() if count > 1]
    return problems


def _first_difference(sent: TensorRecord, received: TensorRecord) -> str:
    for field in ("shape", "dtype", "digest"):
        wanted, found = getattr(sent, field), getattr(received, field)
        if wanted != found:
            return f"{field}: sent {wanted}, received {found}"
    raise AssertionError(f"the records of {sent.name} are equal")
