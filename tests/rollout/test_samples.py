import pytest

from grpo.errors import DataError
from grpo.rollout.samples import check_prompt


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
