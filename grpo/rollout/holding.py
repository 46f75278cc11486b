"""What an engine core tells of its requests: their first tokens at once, the others in parts. Loads vLLM.

vLLM's core sends every token and its logprob when it is made, packed and unpacked one request at a time. With hundreds
of sequences that took more of a core's one Python thread than a step takes the GPU, and nobody waits for a single
token here. What is told, and in which order, stays the same; texts that end a completion are looked for by the front
end, so requests with `stop` are told of every token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists

MOST_TOKENS = 64
"""Of one request that are held: counters of tokens follow within a second or two."""


@dataclass
class Part:
    """Tokens and events of one request that its client has not heard of, with logprobs and ranks if it wants those."""

    client: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    events: list[EngineCoreEvent] = field(default_factory=list)

    def add(self, output: EngineCoreOutput) -> None:
        """What one output tells, behind all that was added."""
        self.tokens += output.new_token_ids
        self.events += output.events or ()
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
            self.ranks += output.new_logprobs.sampled_token_ranks.tolist()


class Held:
    """The parts of one core. `requests` are those that its scheduler knows, by name; others were aborted."""

    def __init__(self, requests: Mapping[str, Any]) -> None:
        self.requests = requests
        self._parts: dict[str, Part] = {}

    def hold(self, step: dict[int, EngineCoreOutputs]) -> None:
        """Takes out of a step's outputs, by client, what can wait, and adds what has waited to the others."""
        for client, outputs in list(step.items()):
            outputs.outputs = [output for output in outputs.outputs if not self._waits(client, output)]
            if not (outputs.outputs or outputs.finished_requests or outputs.scheduler_stats):
                del step[client]
        if len(self._parts) > len(self.requests):
            self._parts = {name: part for name, part in self._parts.items() if name in self.requests}

    def all(self, version: str) -> list[tuple[int, EngineCoreOutputs]]:
        """Everything that is held, by client: tokens that weights of this version have made. Nothing is held then."""
        by_client: dict[int, list[EngineCoreOutput]] = {}
        for name, part in self._parts.items():
            if name in self.requests:
                by_client.setdefault(part.client, []).append(_told(EngineCoreOutput(name, []), part))
        self._parts = {}
        return [(client, EngineCoreOutputs(outputs=told, weight_version=version)) for client, told in by_client.items()]

    def _waits(self, client: int, output: EngineCoreOutput) -> bool:
        """Whether an output is held; one that is not has got what was held of its request."""
        part = self._parts.get(output.request_id)
        ends = output.finish_reason is not None
        if part is None:
            if not ends and output.prefill_stats is None and self._may_wait(output.request_id):
                part = self._parts[output.request_id] = Part(client)
            else:
                return False
        if not ends and len(part.tokens) < MOST_TOKENS:
            part.add(output)
            return True
        del self._parts[output.request_id]
        _told(output, part)
        return False

    def _may_wait(self, name: str) -> bool:
        request = self.requests.get(name)
        params: SamplingParams | None = request.sampling_params if request is not None else None
        if params is None or params.output_kind != RequestOutputKind.FINAL_ONLY:
            return False
        return not params.stop and params.num_logprobs in (None, 0)  # 0: of the sampled token alone


def _told(output: EngineCoreOutput, part: Part) -> EngineCoreOutput:
    """The output with what was held before it."""
    part.add(output)
    output.new_token_ids, output.events = part.tokens, part.events or None
    if part.logprobs:
        ids, logprobs = np.array(part.tokens, dtype=np.int32), np.array(part.logprobs, dtype=np.float32)
        output.new_logprobs = LogprobsLists(ids[:, None], logprobs[:, None], np.array(part.ranks, dtype=np.int64))
    return output
