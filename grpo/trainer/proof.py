"""The proof that a model is computed right: packed rows score as the plain forward of transformers scores them alone.

A model is plain where nothing of ours is in it: loaded anew, eager attention, its own head, one row at a time. A row
that sees another, a position that is off, an argument that the packed attention does not know, a state that one row
leaves to the next: each changes the logprobs of rows that stand in one pack. What rounding changes is measured on the
plain model itself and sets the limits, so in float32 little passes, and in bfloat16 what its rounding makes of this
model. Small models are proved in float32 too, on a copy, where bfloat16 would hide much.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from grpo.config.text import first_line
from grpo.errors import ConfigError
from grpo.trainer.model import Policy
from grpo.trainer.packing import pack
from grpo.types import Sample

SMALL_PARAMETERS = 2_000_000_000
"""Models up to here are copied in float32."""
LONGEST_WINDOW = 1024
"""A sliding window up to here is proved by a row that is longer."""
FLOORS = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Mean difference, in nats, that rounding of any model may come to."""
UNKNOWN = 0.15
"""The floor where the rounding of bfloat16 could not be measured against float32."""
FACTOR = 4.0
"""How much more than the plain model in another layout the packed rows may differ."""
PEAK = 10.0
"""How much further than the mean the worst token may be off, in units of the mean's limit."""
WAY_OUT = "this architecture cannot be trained here, choose another model in model.path"

Load = Callable[[torch.dtype], Any]
"""A plain model in this precision, with eager attention, on the device of the proof."""


@dataclass(frozen=True, slots=True)
class Proof:
    """`logprobs_C` are those of `rows` as packed; `noise` is the mean of what rounding changes in them, in nats."""

    rows: tuple[Sample, ...]
    logprobs_C: torch.Tensor
    noise: float
    limit: "Limit"


@dataclass(frozen=True, slots=True)
class Limit:
    """Largest difference in nats: of the mean over tokens, and of a single one."""

    mean: float
    peak: float

    def broken(self, found_C: torch.Tensor, true_C: torch.Tensor) -> str:
        """How far off they are, or ""."""
        off_C = (found_C - true_C).abs()
        mean, peak = float(off_C.mean()), float(off_C.max())
        if mean <= self.mean and peak <= self.peak:  # false for NaN
            return ""
        return (
            f"{mean:.3g} nats a token on average and {peak:.3g} at most, where rounding explains {self.mean:.2g} and "
            f"{self.peak:.2g}"
        )


def prove(policy: Policy, load: Load, wrap: Callable[[Any], Policy], max_length: int) -> Proof:
    """Compares the packed forward of `policy` with a plain model; `wrap` makes a policy of one, as ours was made.

    Raises ConfigError where they differ by more than rounding.
    """
    weight = next(policy.parameters())
    dtype, config = weight.dtype, policy.causal_lm.config.get_text_config()
    rows = proof_rows(config, max_length)
    found_C = packed_logprobs(policy, rows)
    small = sum(param.numel() for param in policy.parameters()) <= SMALL_PARAMETERS
    exact = load(torch.float32 if small else dtype)
    true_C = plain_logprobs(exact, rows, policy.temperature)
    padded_C = padded_logprobs(exact, rows, policy.temperature)
    noise_C = (padded_C - true_C).abs()
    limit = make_limit(torch.float32 if small else dtype, noise_C, measured=small)
    if dtype != torch.float32 and small:
        _check(policy, packed_logprobs(wrap(exact), rows), true_C, limit, "in float32")
        del exact
        noise_C = (plain_logprobs(load(dtype), rows, policy.temperature) - true_C).abs()
        limit = make_limit(dtype, noise_C, measured=True)
    _check(policy, found_C, true_C, limit, f"in {str(dtype).removeprefix('torch.')}")
    return Proof(rows, found_C, float(noise_C.mean()), limit)


def make_limit(dtype: torch.dtype, noise_C: torch.Tensor, measured: bool) -> Limit:
    """From what rounding did to the plain model. `measured`: against float32, and not only in another layout."""
    floor = FLOORS[dtype] if measured else max(FLOORS[dtype], UNKNOWN)
    mean = floor + FACTOR * float(noise_C.mean())
    return Limit(mean, PEAK * floor + FACTOR * float(noise_C.max()))


def proof_rows(config: Any, max_length: int) -> tuple[Sample, ...]:
    """Rows of random tokens: three with the same prompt, three others, one of a single prompt token.

    One is longer than the sliding window, if the model has one and a row of the run can be that long.
    """
    rng = random.Random("grpo proof")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(config.vocab_size) for _ in range(count))

    shared = tokens(24)
    sizes = [(shared, 20), (tokens(7), 33), (shared, 9), (tokens(1), 5), (shared, 31), (tokens(40), 12)]
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and window + 16 <= max_length and window <= LONGEST_WINDOW:
        sizes.append((tokens(window // 2 + 1), window // 2 + 15))
    most = max_length // 2
    return tuple(
        Sample(f"proof {row}", 0, prompt[:most], output, (0.0,) * len(output), ((0, 0),), "stop", "", advantage=1.0)
        for row, (prompt, count) in enumerate(sizes)
        if (output := tokens(min(count, max_length - len(prompt[:most]))))
    )


@torch.no_grad()
def packed_logprobs(policy: Policy, rows: Sequence[Sample]) -> torch.Tensor:
    """Of the rows' completions, by our forward over one pack. Raises ConfigError where the model cannot run so."""
    batch = pack(rows).to(next(policy.parameters()).device)
    try:
        logprobs_C: torch.Tensor = policy(batch)[0]
        return logprobs_C.float().cpu()
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:  # a model's own code, called as it does not expect
        raise ConfigError(
            f"the trainer must run the model on packed rows, but {type(policy.causal_lm).__name__} fails there "
            f"({type(error).__name__}: {first_line(error)}); {WAY_OUT}"
        ) from error


@torch.no_grad()
def plain_logprobs(causal_lm: Any, rows: Sequence[Sample], temperature: float) -> torch.Tensor:
    """The same by transformers alone: one row at a time, without a mask."""
    return torch.cat([_scored(causal_lm(**_batch(causal_lm, [row])), [row], temperature) for row in rows])


@torch.no_grad()
def padded_logprobs(causal_lm: Any, rows: Sequence[Sample], temperature: float) -> torch.Tensor:
    """The same in another layout, whose sums are rounded otherwise: two rows at a time, padded on the right."""
    pairs = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    return torch.cat([_scored(causal_lm(**_batch(causal_lm, pair)), pair, temperature) for pair in pairs])


def _batch(causal_lm: Any, rows: Sequence[Sample]) -> dict[str, Any]:
    ids = [torch.tensor(row.prompt_ids + row.output_ids) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([[len(row)] for row in ids])
    mask = (torch.arange(padded.shape[1]) < lengths).long()
    device = next(causal_lm.parameters()).device
    batch = {"input_ids": padded.to(device), "use_cache": False}
    return batch | ({"attention_mask": mask.to(device)} if len(rows) > 1 else {})


def _scored(output: Any, rows: Sequence[Sample], temperature: float) -> torch.Tensor:
    scored = []
    for logits_TV, row in zip(output.logits, rows, strict=True):
        end = len(row.prompt_ids) + len(row.output_ids)
        logits_CV = logits_TV[len(row.prompt_ids) - 1 : end - 1].float() / temperature
        targets_C = torch.tensor(row.output_ids, device=logits_CV.device)
        scored.append(F.log_softmax(logits_CV, -1).gather(1, targets_C[:, None])[:, 0].cpu())
    return torch.cat(scored)


def _check(policy: Policy, found_C: torch.Tensor, true_C: torch.Tensor, limit: Limit, how: str) -> None:
    if broken := limit.broken(found_C, true_C):
        raise ConfigError(
            f"the trainer must compute the model as transformers does, but packed rows of "
            f"{type(policy.causal_lm).__name__} differ {how} from rows alone by {broken}; "
            f"{WAY_OUT}"
        )
