"""A worker's end of the weight transfer that a test can break; vLLM loads it into the engine core in place of ours."""

from typing import Any

from vllm.v1.core import kv_cache_utils

from grpo.rollout import receiver
from grpo.rollout.receiver import Receiver
from grpo.rollout.vllm_private import finish_reload, layerwise

EXTRA_KEYS = kv_cache_utils.generate_block_hash_extra_keys


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
    def attack(self, fault: str) -> Any:
        transport: Any = self.transport
        if fault == "places":
            return (len(self.places.views) if self.places else 0), self.placeless
        if fault == "communicator disabled":
            self.real = transport.group  # stays open: the sender must see nothing
            transport.group = Silent()
        elif fault == "tied head stale":
            receiver.finish_reload = finish_without_head
        elif fault == "salts ignored":
            kv_cache_utils.generate_block_hash_extra_keys = lambda *_: (None, 0)
        elif fault == "none":
            receiver.finish_reload = finish_reload
            kv_cache_utils.generate_block_hash_extra_keys = EXTRA_KEYS
        elif fault == "copy altered":
            record, tensor = next(pair for pair in self.shadow._tensors if "up_proj" in pair[0].name)
            tensor.view(-1)[7] += 1.0
        elif fault == "copy lost":
            self.shadow = None
        elif fault == "copy of another version":
            self.shadow.version -= 1
        elif fault == "copy half loaded":
            kept = [pair for pair in self.shadow._tensors if "up_proj" not in pair[0].name]
            self.shadow._tensors = kept
        else:
            raise ValueError(fault)
