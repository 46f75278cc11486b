"""From the sums of micro-batches and ranks to the numbers of an update, and from updates to those of a step."""

from collections.abc import Sequence

import torch
from torch import distributed

from grpo.algorithm.loss import LossOutput
from grpo.algorithm.mismatch import Mismatch
from grpo.types import Stats


def reduce_outputs(
    outputs: Sequence[LossOutput], forwarded: int, names: Sequence[str], device: torch.device
) -> tuple[Stats, Mismatch]:
    """Adds the outputs of all micro-batches and ranks up to means over the minibatch's forwarded tokens.

    A collective; `names` are those of the loss's sums, "tokens" first. A loss that is not finite on one rank is so on
    all.
    """
    sums = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)
    peak = torch.zeros(1, dtype=torch.float64, device=device)
    mismatch = Mismatch.none(device)
    for output in outputs:
        sums[:-1] += torch.stack([output.loss.detach().double(), *(output.sums[name].double() for name in names)])
        peak = torch.maximum(peak, output.ratio_max.double())
        mismatch += output.mismatch
    sums[-1] = forwarded
    totals = torch.cat([sums, mismatch.sums])
    maxima = torch.cat([peak, mismatch.maxima])
    distributed.all_reduce(totals)
    distributed.all_reduce(maxima, op=distributed.ReduceOp.MAX)
    loss, tokens, *rest, total_forwarded = totals[: len(sums)].tolist()
    means = {name: total / max(tokens, 1.0) for name, total in zip(names[1:], rest, strict=True)}
    stats = means | {"loss": loss, "forwarded": total_forwarded}
    if ratio_max := maxima[0].item():  # 0: nobody sampled these rows
        stats["ratio_max"] = ratio_max
    return stats, Mismatch(totals[len(sums) :], maxima[1:])


def summarise(updates: Sequence[Stats], rate: float, skipped: int) -> Stats:
    """Means over a step's updates.

    Without updates a step has no loss if some were skipped, and a loss of 0 if no row had an advantage.
    """
    stats: Stats = {"learning_rate": rate} if skipped else {"loss": 0.0, "grad_norm": 0.0, "learning_rate": rate}
    if updates:
        stats = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        if "ratio_max" in stats:
            stats["ratio_max"] = max(update["ratio_max"] for update in updates)
    return stats | {"updates": float(len(updates)), "skipped": float(skipped)}
