"""What a rank tries before the first step: the proof of the model, and an update that is thrown away."""

import math

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from grpo.config import Config
from grpo.config.text import first_line
from grpo.errors import ConfigError, GrpoError
from grpo.trainer.adapter import adapted_layers
from grpo.trainer.collective import raise_on_all_ranks
from grpo.trainer.deepspeed import Engine
from grpo.trainer.model import Policy, make_policy
from grpo.trainer.packing import pack
from grpo.trainer.proof import Proof, packed_logprobs, proof_rows, prove

SPARE = 2.0
"""The copies of the proof go to the GPU if it has this many times their size free, else to the CPU."""


def prove_on_rank_0(policy: Policy, config: Config) -> Proof:
    """The proof by rank 0, for all ranks; they still hold the whole model. Raises ConfigError on all alike."""
    failure: GrpoError | None = None
    found: list[Proof | None] = [None]
    device = copies_device(policy, config)

    def load(dtype: torch.dtype) -> torch.nn.Module:
        path, revision = config.model.path, config.model.revision
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )
        return model.to(device).eval()

    def wrap(plain: torch.nn.Module) -> Policy:
        return make_policy(plain, policy.temperature)

    if distributed.get_rank() == 0:
        try:
            found[0] = prove(policy, load, wrap, config.model.max_length)
        except ConfigError as error:
            failure = error
    raise_on_all_ranks(failure)
    distributed.broadcast_object_list(found)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    assert found[0] is not None, "rank 0 has a proof or an error"
    return found[0]


def check_adapter(policy: Policy, max_length: int) -> None:
    """Whether the model calls its layers that have an adapter, before anything is compiled.

    A model that reads a layer's weight would not see what the adapter adds: it would learn nothing there, silently.
    Experts of one name count together, since rows need not reach them all. Raises ConfigError.
    """
    called: set[str] = set()
    kinds = {one.name: one.name.rpartition(".")[2] for one in adapted_layers(policy.causal_lm).values()}
    hooks = [
        one.layer.register_forward_pre_hook(lambda *_, kind=kinds[one.name]: called.add(kind))
        for one in adapted_layers(policy.causal_lm).values()
    ]
    try:
        packed_logprobs(policy, proof_rows(policy.causal_lm.config.get_text_config(), max_length))
    finally:
        for hook in hooks:
            hook.remove()
    if never := sorted(set(kinds.values()) - called):
        names = ", ".join(sorted(called)) or "none of them"
        raise ConfigError(
            f"train.lora.targets: a layer with an adapter must be called, but {type(policy.causal_lm).__name__} only "
            f"reads the weights of {', '.join(never)}; name others (called are: {names}), or leave train.lora out"
        )


def copies_device(policy: Policy, config: Config) -> torch.device:
    """Where the plain copies go: not to a GPU with an engine on it, which counts what is free there."""
    weight = next(policy.parameters())
    shared = (config.train.gpus_per_rank or 1.0) < 1.0
    if weight.device.type != "cuda" or shared:
        return torch.device("cpu")
    size = 4 * sum(param.numel() for param in policy.parameters())
    return weight.device if torch.cuda.mem_get_info(weight.device)[0] > SPARE * size else torch.device("cpu")


def rehearse_update(engine: Engine, proof: Proof, device: torch.device, entropy_gradient: bool) -> None:
    """Forward and backward of the proof's rows through the engine, whose optimizer then skips the update.

    The logprobs must be those that were proved. A loss of NaN at the end of the accumulation makes every optimizer
    throw the whole of it away, so nothing of it stays. Raises ConfigError on all ranks alike.
    """
    packed = pack(proof.rows).to(device)
    logprobs_C, entropy_C = engine(packed)
    failure: GrpoError | None = None
    if broken := proof.limit.broken(logprobs_C.detach().float().cpu(), proof.logprobs_C):
        failure = ConfigError(
            f"a rank must compute the model under DeepSpeed as it does without, but they differ by {broken}; try "
            "another train.zero_stage or model.dtype"
        )
    raise_on_all_ranks(failure)
    loss = logprobs_C.mean() + (entropy_C.mean() if entropy_gradient else 0.0)
    try:
        engine.backward(loss, last=False)
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError) as error:
        raise ConfigError(
            f"the model must have a gradient, but its backward pass fails ({type(error).__name__}: "
            f"{first_line(error)}); choose another model in model.path"
        ) from error
    throw_away(engine, device)


def throw_away(engine: Engine, device: torch.device) -> None:
    """Ends an accumulation whose gradient nobody wants."""
    filler, _ = engine(pack([]).to(device))
    engine.backward(filler.sum() * math.nan, last=True)
    norm, _ = engine.step(0.0)
    assert not math.isfinite(norm), f"an update of NaN was made: its norm is {norm}"
