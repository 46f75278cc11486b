"""Made-up outputs of an engine core, and a client that hears them. Loads vLLM."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists


def request(stop: list[str] | None = None, delta: bool = False, logprobs: int = 0) -> Any:
    """What a scheduler knows of a request."""
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY
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
        events=[EngineCoreEvent(EngineCoreEventType.PREEMPTED, float(token))],
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
            assert [event.timestamp for event in output.events or ()] == output.new_token_ids
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            versions = [str(outputs.weight_version)] * len(output.new_token_ids)
            self.versions.setdefault(output.request_id, []).extend(versions)
            assert output.new_logprobs is not None
            assert output.new_logprobs.logprob_token_ids[:, 0].tolist() == output.new_token_ids
            assert output.new_logprobs.logprobs[:, 0].tolist() == [-token for token in output.new_token_ids]
            assert output.new_logprobs.sampled_token_ranks.tolist() == output.new_token_ids
