"""A worker's end of the weight transfer that a test can break; vLLM loads it into the engine core in place of ours."""

from typing import Any

from grpo.rollout import receiver
from grpo.rollout.receiver import Receiver
from grpo.rollout.vllm_private import layerwise


class Silent:
    """A group whose collectives do nothing and say so to nobody, as a communicator that switched itself off."""

    def broadcast(self, *_: object) -> "Silent":
        return self

    def wait(self, *_: object) -> None: ...

    def abort(self) -> None: ...


def finish_without_head(model: Any, model_config: Any, _: Any) -> None:
    """What vLLM does by itself: the packed copy of a tied head stays as it was."""
    layerwise.finalize_layerwise_processing(model, model_config)


class AttackedReceiver(Receiver):
    def attack(self, fault: str) -> None:
        transport: Any = self.transport
        if fault == "communicator disabled":
            self.real = transport.group  # stays open: the sender must see nothing
            transport.group = Silent()
        elif fault == "tied head stale":
            receiver.finish_reload = finish_without_head
        else:
            raise ValueError(fault)
