"""Outputs of a core that wait: whatever is held, each request is told the same tokens and logprobs in order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason  # noqa: E402
from vllm.v1.metrics.stats import PrefillStats  # noqa: E402
from vllm.v1.outputs import LogprobsLists  # noqa: E402

from grpo.rollout.holding import MOST_TOKENS, Held  # noqa: E402


def request(
    stop: list[str] | None = None, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY, logprobs: int = 0
) -> Any:
    params = SamplingParams(stop=stop, output_kind=kind, logprobs=logprobs, detokenize=bool(stop))
    return SimpleNamespace(sampling_params=params)


def made(name: str, token: int, ends: bool = False, first: bool = False) -> EngineCoreOutput:
    """One token of a request, whose logprob is minus the token."""
    return EngineCoreOutput(
        name,
        [token],
        new_logprobs=LogprobsLists(
            np.array([[token]], dtype=np.int32), np.array([[-token]], dtype=np.float32), np.array([token], dtype=int)
        ),
        finish_reason=FinishReason.LENGTH if ends else None,
        prefill_stats=PrefillStats() if first else None,
    )


class Client:
    """Hears what a core tells."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.versions: dict[str, list[str]] = {}
        self.messages = 0

    def hear(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            self.messages += 1
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            versions = [str(outputs.weight_version)] * len(output.new_token_ids)
            self.versions.setdefault(output.request_id, []).extend(versions)
            assert output.new_logprobs is not None
            assert output.new_logprobs.logprob_token_ids[:, 0].tolist() == output.new_token_ids
            assert output.new_logprobs.logprobs[:, 0].tolist() == [-token for token in output.new_token_ids]
            assert output.new_logprobs.sampled_token_ranks.tolist() == output.new_token_ids


@given(
    lengths=st.lists(st.integers(1, 3 * MOST_TOKENS), min_size=1, max_size=6),
    switches=st.sets(st.integers(1, 3 * MOST_TOKENS), max_size=3),
)
def test_every_token_is_told_once_in_order_and_with_the_version_that_made_it(
    lengths: list[int], switches: set[int]
) -> None:
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


def test_the_first_token_comes_at_once_and_the_others_with_the_last() -> None:
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


@pytest.mark.parametrize(
    "asked",
    [request(stop=["#"]), request(kind=RequestOutputKind.DELTA), request(logprobs=3)],
    ids=["stop", "stream", "3"],
)
def test_who_needs_every_token_gets_every_token(asked: Any) -> None:
    held = Held({"a": asked})
    for token in range(3):
        outputs = {0: EngineCoreOutputs(outputs=[made("a", token, first=token == 0)])}
        held.hold(outputs)
        assert [output.new_token_ids for output in outputs[0].outputs] == [[token]]


def test_an_aborted_request_is_forgotten() -> None:
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
