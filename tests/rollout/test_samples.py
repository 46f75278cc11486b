from types import SimpleNamespace
from typing import Any

import pytest

from grpo.errors import DataError
from grpo.rollout.samples import Words, check_prompt, make_sample
from grpo.types import Prompt
from tests.engines import EOS, make_tokenizer


def test_a_prompt_that_would_end_the_engine_core_is_refused_by_name() -> None:
    check_prompt("p:1", [0, 99] * 188, longest=376, vocab_size=100)
    with pytest.raises(DataError, match=r"vocabulary of 100, but prompt p:2 has 100; use the tokenizer"):
        check_prompt("p:2", [5, 100], 376, 100)
    with pytest.raises(DataError, match=r"prompt p:3 has -1"):
        check_prompt("p:3", [-1], 376, 100)
    with pytest.raises(DataError, match=r"1 to 376 tokens .* prompt p:4 has 377"):
        check_prompt("p:4", [5] * 377, 376, 100)
    with pytest.raises(DataError, match=r"prompt p:5 has 0"):
        check_prompt("p:5", [], 376, 100)


def made(ids: list[int], spans: list[tuple[int, int, str]]) -> Any:
    """What vLLM answers."""
    return SimpleNamespace(
        token_ids=ids,
        finish_reason="stop",
        logprobs=SimpleNamespace(token_ids=ids, logprobs=[-0.5] * len(ids)),
        weight_versions=[SimpleNamespace(start=start, end=end, version=version) for start, end, version in spans],
    )


def test_each_token_keeps_the_version_that_made_it() -> None:
    prompt = Prompt("p:1", "q", "a", (1, 2))
    sample = make_sample(prompt, 3, made([4, 5, 6], [(0, 2, "7"), (2, 3, "8")]), "text")
    assert sample.versions == ((0, 7), (2, 8)) and sample.output_ids == (4, 5, 6)
    assert (sample.oldest_version, sample.newest_version, sample.lag(9)) == (7, 8, 1)
    assert sample.trained_tokens == 3 and list(sample.trained_places) == [0, 1, 2]
    assert make_sample(prompt, 0, made([4], [(0, 1, "7")]), "").versions == ((0, 7),)


def test_rewards_see_all_that_the_model_wrote_but_the_ends_and_the_padding() -> None:
    tokenizer = make_tokenizer()
    a, dot, space = (tokenizer.convert_tokens_to_ids(char) for char in "a. ")
    outputs = [[a, 2, a, EOS], [0, a, 0, EOS], [space, dot], []]
    assert Words(tokenizer, [EOS], False).texts((a,), outputs) == ["a<unk>a", "a", " .", ""]
    assert Words(tokenizer, [EOS], True).texts((a,), outputs) == ["aa", "a", " .", ""]
    assert Words(tokenizer, [EOS, a], False).texts((), [[space, 2, a]]) == [" <unk>"]


def test_the_space_before_the_first_word_is_kept() -> None:
    """Sentencepiece's way of decoding drops the first space of a text; a completion is not the beginning of one."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\u2581Hello": 1, "\u2581world": 2, "</s>": 3, "<|tool|>": 4}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<|tool|>"]
    )
    assert tokenizer.decode([2]) == "world"
    words = Words(tokenizer, [3], False)
    assert words.texts((1, 1), [[2, 1, 3], [4, 2], [1]]) == [" world Hello", "<|tool|> world", " Hello"]
