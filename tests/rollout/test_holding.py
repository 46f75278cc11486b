"""Outputs of a core that wait: whatever is held, each request is told the same tokens and logprobs in order."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

LONGEST = 200


@pytest.mark.slow
@settings(deadline=None)  # the first example loads vLLM
@given(lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6), switches=st.sets(st.integers(1, LONGEST)))
def test_every_token_is_told_once_in_order_and_with_the_version_that_made_it(
    lengths: list[int], switches: set[int]
) -> None:
    from grpo.rollout.holding import MOST_TOKENS, Held
    from tests.rollout.core_outputs import Client, EngineCoreOutputs, made, request

    requests: dict[str, Any] = {str(row): request() for row in range(len(lengths))}
    held, client, version = Held(requests), Client(), 0
    wanted: dict[str, list[str]] = {name: [] for name in requests}
    for step in range(max(lengths)):
        if step in switches:
            for _, told in held.all(str(version)):
                client.hear(told)
            version += 1
        alive = [row for row, length in enumerate(lengths) if step < length]
        outputs = [made(str(row), 1000 * row + step, step + 1 == lengths[row], step == 0) for row in alive]
        for row in alive:
            wanted[str(row)].append(str(version))
            if step + 1 == lengths[row]:
                del requests[str(row)]  # as a scheduler does before it tells
        told_by_client = {0: EngineCoreOutputs(outputs=outputs)}
        held.hold(told_by_client)
        for told in told_by_client.values():
            told.weight_version = str(version)
            client.hear(told)
    assert client.tokens == {str(row): [1000 * row + step for step in range(n)] for row, n in enumerate(lengths)}
    assert client.versions == wanted
    assert client.messages <= sum(2 + length // MOST_TOKENS + len(switches) for length in lengths)


@pytest.mark.slow
def test_the_first_token_comes_at_once_and_the_others_with_the_last() -> None:
    from grpo.rollout.holding import Held
    from tests.rollout.core_outputs import EngineCoreOutputs, made, request

    requests = {"a": request()}
    held = Held(requests)
    first = {0: EngineCoreOutputs(outputs=[made("a", 1, first=True)])}
    held.hold(first)
    assert [output.new_token_ids for output in first[0].outputs] == [[1]]
    second = {0: EngineCoreOutputs(outputs=[made("a", 2)])}
    held.hold(second)
    assert second == {}  # nothing is sent at all
    last = {0: EngineCoreOutputs(outputs=[made("a", 3, ends=True)])}
    held.hold(last)
    assert [output.new_token_ids for output in last[0].outputs] == [[2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"stop": ["#"]}, {"logprobs": 3}, {"delta": True}], ids=str)
def test_who_needs_every_token_gets_every_token(asked: dict[str, Any]) -> None:
    from grpo.rollout.holding import Held
    from tests.rollout.core_outputs import EngineCoreOutputs, made, request

    held = Held({"a": request(**asked)})
    for token in range(3):
        outputs = {0: EngineCoreOutputs(outputs=[made("a", token, first=token == 0)])}
        held.hold(outputs)
        assert [output.new_token_ids for output in outputs[0].outputs] == [[token]]


@pytest.mark.slow
def test_an_aborted_request_is_forgotten() -> None:
    from grpo.rollout.holding import Held
    from tests.rollout.core_outputs import EngineCoreOutputs, made, request

    requests = {"a": request(), "b": request()}
    held = Held(requests)
    held.hold({0: EngineCoreOutputs(outputs=[made("a", 1, first=True), made("b", 1, first=True)])})
    held.hold({0: EngineCoreOutputs(outputs=[made("a", 2), made("b", 2)])})
    del requests["a"]
    held.hold({0: EngineCoreOutputs(outputs=[made("b", 3)])})
    [(client, told)] = held.all("7")
    assert (client, told.weight_version) == (0, "7")
    assert [(output.request_id, output.new_token_ids) for output in told.outputs] == [("b", [2, 3])]
    assert held.all("8") == []
