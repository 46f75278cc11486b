"""What goes into the engine is checked, and what comes out becomes samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo.errors import ClusterError, DataError
from grpo.types import Prompt, Sample

if TYPE_CHECKING:
    from vllm import RequestOutput


def check_prompt(name: str, token_ids: Sequence[int], longest: int, vocab_size: int) -> None:
    """An id beyond the vocabulary or a prompt that is too long would end the engine core, so neither gets there.

    `longest` is model.max_length minus the completion's room. Raises: DataError naming the prompt.
    """
    if not 0 < len(token_ids) <= longest:
        raise DataError(
            f"a prompt must have 1 to {longest} tokens (model.max_length minus the completion's), but prompt {name} "
            f"has {len(token_ids)}; drop it or raise model.max_length"
        )
    wrong = [token for token in token_ids if not 0 <= token < vocab_size]
    if wrong:
        raise DataError(
            f"token ids must be below the model's vocabulary of {vocab_size}, but prompt {name} has "
            f"{wrong[0]}; use the tokenizer that belongs to the model"
        )


def make_samples(prompt: Prompt, outputs: "Sequence[RequestOutput]", count: int, tokenizer: Any) -> tuple[Sample, ...]:
    """`count` samples of one prompt from vLLM's answers, in order; a greedy one is repeated.

    Raises: ClusterError if the engine ended a sample for a reason of its own.
    """
    made = [output.outputs[0] for output in outputs] * (count // len(outputs))
    texts = tokenizer.batch_decode([list(item.token_ids) for item in made], skip_special_tokens=True)
    return tuple(make_sample(prompt, index, made[index], texts[index]) for index in range(count))


def make_sample(prompt: Prompt, index: int, made: Any, text: str) -> Sample:
    """One completion out of vLLM's answer. Raises: ClusterError if the engine ended it for a reason of its own."""
    if made.finish_reason not in ("stop", "length"):
        raise ClusterError(
            f"a sample ends by stop or length, but the engine ended one of prompt {prompt.id} by "
            f"{made.finish_reason}; its log says why"
        )
    assert list(made.logprobs.token_ids) == list(made.token_ids), "one logprob for each sampled token, in order"
    assert made.weight_versions, "vLLM stamps every sample"
    return Sample(
        prompt_id=prompt.id,
        index=index,
        prompt_ids=prompt.token_ids,
        output_ids=tuple(made.token_ids),
        logprobs=tuple(made.logprobs.logprobs),
        versions=tuple((span.start, int(span.version)) for span in made.weight_versions),
        finish_reason=made.finish_reason,
        text=text,
    )
