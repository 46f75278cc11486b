"""The supervised warm-up (`grpo sft`): what is learned from the rows' own completions, and for how long."""

from typing import Literal

from pydantic import Field

from grpo.config.fields import Positive
from grpo.config.section import Section

MOST_ROWS_PER_STEP = 2**19


class Sft(Section):
    """Supervised warm-up before GRPO (`grpo sft`), on the rows of `data`; `grpo train` does not look at it."""

    completion: str | None = Field(None, min_length=1, max_length=255)
    """Column of the completion that a row teaches, text or the assistant's messages; null: data.answer_column."""
    format: Literal["as_is", "gsm8k", "boxed"] = "as_is"
    """as_is; gsm8k: without its calculator notes <<48/2=24>>, "#### 42" stays; boxed: "#### 42" becomes \\boxed{42}."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the rows; 0.1 is a tenth of them. The last step is filled up from the next pass."""
    steps: Positive | None = None
    """Steps, one optimizer update each; null: as many as sft.epochs takes."""
    rows_per_step: int = Field(32, ge=1, le=MOST_ROWS_PER_STEP)
    """Rows of a step, over all ranks."""
    learning_rate: float = Field(1e-5, gt=0, le=1)
    """Peak learning rate; weight decay, betas, ranks, ZeRO stage and micro-batches are those of `train`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine reach 0 behind the last step."""
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    eval_every: int = Field(0, ge=0, le=1_000_000_000)
    """Steps between two evaluations of the loss on the rows of `eval`; 0: before the first and after the last only."""
