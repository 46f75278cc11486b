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


class Words:
    """From the tokens of completions to their text, as rewards see it: all that the model wrote.

    Left out are only the tokens that end a completion or fill it up (`stop_ids` and the pad token), or all special ones
    where `skip_special` says so. Decoding goes on from the last token of the prompt: some tokenizers drop the space
    before the first word of a text, and a completion is not the beginning of one.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], skip_special: bool) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.silent = {*stop_ids, tokenizer.pad_token_id}

    def texts(self, prompt_ids: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[str]:
        """The text of each output behind the same prompt."""
        before = list(prompt_ids[-1:])
        rows = [[token for token in output if token not in self.silent] for output in outputs]
        start, *whole = self._decode([before, *([*before, *row] for row in rows)])
        alone = self._decode(rows) if not all(text.startswith(start) for text in whole) else []
        return alone or [text[len(start) :] for text in whole]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            rows,
            skip_special_tokens=self.skip_special,
            clean_up_tokenization_spaces=False,  # it would change what was written, such as " ." to "."
            spaces_between_special_tokens=False,
        )
        return texts


def make_samples(prompt: Prompt, outputs: "Sequence[RequestOutput]", count: int, words: Words) -> tuple[Sample, ...]:
    """`count` samples of one prompt from vLLM's answers, in order; a greedy one is repeated.

    Raises: ClusterError if the engine ended a sample for a reason of its own.
    """
    made = [output.outputs[0] for output in outputs] * (count // len(outputs))
    texts = words.texts(prompt.token_ids, [item.token_ids for item in made])
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
