"""The start-up self-test: do the engines compute with the weights that were sent, and not only hold them?

Manifests see what arrived. They do not see a copy that the engine computes with and never refreshes: on the CPU build
of vLLM the packed copy of a tied head. So the trainer sends a strongly perturbed policy and then the true one, and the
engines' logprobs of a fixed prompt must follow it both times. A small perturbation would hide in rounding errors, and
a large one amplifies them: in bfloat16 SmolLM2-135M differs by 0.3 nats where the noise moved it by 7.
"""

import math
from collections.abc import Sequence

from grpo.errors import WeightSyncError
from grpo.types import Manifest, TensorRecord

STRONG = 3.0
"""The perturbation must move the trainer's own logprobs by this many tolerances, else the test proves nothing."""

SHARE = 0.2
"""How much of the perturbation's effect an engine may miss: 0.02 to 0.07 is rounding, an unmoved engine misses all."""

RARE, TAIL = 20, 8.0
"""One token in RARE may differ by TAIL limits: the mean alone would hide a few that are wrong in a long prompt."""

Compared = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Logprobs of tokens 1..T-1 of the fixed prompt: the trainer's, and those of each engine. In nats."""


def check_self_test(perturbed: Compared, true: Compared, tolerance: float, names: Sequence[str] = ()) -> float:
    """The largest mean |trainer - engine| of the true weights over the engines, in nats.

    With the true weights it may be `tolerance`; with the perturbed ones SHARE of the perturbation's effect more.
    `names` are those of the engines, in their order.
    Raises: WeightSyncError if an engine does not follow the trainer or if the perturbation was too weak to tell.
    """
    moved = mean_difference(perturbed[0], true[0])
    if not moved >= STRONG * tolerance:
        raise WeightSyncError(
            f"the self-test's perturbation must move the trainer's logprobs by at least {STRONG * tolerance:.3g} nats, "
            f"but it moved them by {moved:.3g}: an engine that ignores the weights would pass; lower sync.tolerance"
        )
    differences = []
    allowed = {"perturbed": tolerance + SHARE * moved, "true": tolerance}
    for name, (trainer, engines) in (("perturbed", perturbed), ("true", true)):
        if not engines:
            raise WeightSyncError("the self-test needs at least one engine, but none answered; check the engines")
        for engine, logprobs in enumerate(engines):
            difference = mean_difference(trainer, logprobs)
            late = tail_difference(trainer, logprobs)
            if not (difference <= allowed[name] and late <= TAIL * allowed[name]):
                raise WeightSyncError(
                    f"{names[engine] if names else f'engine {engine}'} must follow the trainer within "
                    f"{allowed[name]:.3g} nats (sync.tolerance = {tolerance:.2g}), but with the {name} weights its "
                    "logprobs of the fixed prompt "
                    f"differ by {difference:.3g} on average and {late:.3g} in one of {RARE}; it "
                    "computes with other weights or another precision"
                )
            differences.append(difference)
    return max(differences[-len(true[1]) :])


def check_adapter_sent(perturbed: Manifest, true: Manifest, announced: Sequence[TensorRecord]) -> None:
    """Whether each matrix under an adapter was sent otherwise while nothing but its adapter was perturbed.

    One of many that its adapter does not reach moves logprobs by less than `check_self_test` allows for. Without an
    adapter all weights move, and there is nothing to ask. Raises WeightSyncError.
    """
    if all(record.moves for record in announced):
        return
    moving = {record.name for record in announced if record.moves}
    digests = {record.name: record.digest for record in perturbed.records}
    same = [record.name for record in true.records if record.name in moving and digests[record.name] == record.digest]
    if same:
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        raise WeightSyncError(
            f"an adapter must be merged into each matrix that it changes, but {same[0]}{more} was sent with the same "
            "bits before and after its adapter was perturbed: engines would sample without it; leave its layer out of "
            "train.lora.targets"
        )


def tail_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest absolute difference but for one token in RARE."""
    off = sorted(abs(a - b) for a, b in zip(left, right, strict=True))
    return off[len(off) - 1 - len(off) // RARE]


def mean_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean absolute difference; NaN if a value is not finite, which no threshold accepts.

    Raises: WeightSyncError if there is nothing to compare.
    """
    if len(left) != len(right) or not left:
        raise WeightSyncError(
            f"the self-test compares equally many logprobs, but got {len(left)} and {len(right)}; "
            "its prompt needs at least two tokens"
        )
    return math.fsum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)
