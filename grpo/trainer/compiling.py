"""Decoder layers and head under torch.compile: less time on a GPU, the same numbers up to rounding.

All layers of a kind share what is compiled, for any number of tokens; attention in the middle of each is left as it is
(`attention.py`). It is tried before the first step, forward and backward, on as many tokens as a step's: kernels are
chosen for that size, and a failure leaves the layers as they are. What is compiled is kept for later starts.
"""

import os
import random
from pathlib import Path

import torch
from torch import distributed
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.config import Config
from grpo.config.text import first_line
from grpo.trainer.attention import ATTENTION, packed_attention
from grpo.trainer.fused_head import PLAIN, compiled_kernels
from grpo.trainer.head import LogprobHead
from grpo.trainer.model import Policy
from grpo.trainer.packing import pack
from grpo.types import Sample

BACKEND = "inductor"
TRIED_TOKENS = 4096
"""At most so many tokens are tried: more change no kernel."""
STAGE_3 = "decoder layers run uncompiled: train.zero_stage 3 cuts weights, which are whole one layer at a time"


def compile_where_wanted(policy: Policy, config: Config, device: torch.device) -> tuple[str, ...]:
    """Compiles a policy by train.compile; lines that say why not. A collective."""
    if config.train.compile == "auto" and device.type == "cuda" and config.train.zero_stage == 3:
        return (f"note: {STAGE_3}",)
    if not wanted(config, device):
        return ()
    cause = try_compiling(policy, config)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the proof looks at what is free
    return (f"warning: decoder layers run uncompiled, as torch.compile fails: {cause}",) if cause else ()


def wanted(config: Config, device: torch.device) -> bool:
    """Whether layers are compiled, by train.compile."""
    if config.train.compile == "auto":
        return device.type == "cuda" and config.train.zero_stage < 3
    return config.train.compile


def cache_folder() -> Path:
    """Where compiled kernels stay from start to start, for all runs of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "grpo", "inductor")


def keep_kernels() -> None:
    """Lets torch keep what it compiles in `cache_folder`, if that can be written and nothing else is set."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: torch's own place lasts less long
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def try_compiling(policy: Policy, config: Config) -> str:
    """Compiles the layers of a policy on every rank, or on none. Returns why not, or "". A collective."""
    keep_kernels()
    compile_layers(policy)
    cause = ""
    try:
        # 3 less, as no size of a model is: dynamo would take the two for one, and compile for that number alone.
        tokens = min(TRIED_TOKENS, config.fixed_tokens) - 3
        for share in (1, 2):  # what depends on the number of tokens shows itself
            rows = made_up_rows(config, policy, tokens // share)
            logprobs_C, entropy_C = policy(pack(rows).to(next(policy.parameters()).device))
            (logprobs_C.sum() + (entropy_C.sum() if policy.entropy_gradient else 0.0)).backward()
    except Exception as error:  # a compiler's, of any kind; what is wrong with the model comes again without it
        inner = getattr(error, "inner_exception", error)  # dynamo's own says little in its first line
        cause = f"{type(inner).__name__}: {first_line(inner)}"
    policy.zero_grad()
    if cause := _of_any_rank(cause):
        leave_uncompiled(policy)
    else:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled later runs as it is
    return cause


def compile_layers(policy: Policy) -> None:
    """From the next forward pass on, the layers and the elementwise part of the head are compiled."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))  # never the same twice
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=BACKEND, dynamic=True)
        elif isinstance(module, LogprobHead):
            module.kernels = compiled_kernels(BACKEND)
    policy.compiled = True


def leave_uncompiled(policy: Policy) -> None:
    """Undoes `compile_layers`."""
    AttentionInterface.register(ATTENTION, packed_attention)
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._compiled_call_impl = None
        elif isinstance(module, LogprobHead):
            module.kernels = PLAIN
    policy.compiled = False


def made_up_rows(config: Config, policy: Policy, tokens: int) -> list[Sample]:
    """Rows of random tokens in groups, as a step has them: of the longest prompts and completions, `tokens` in all."""
    rng = random.Random("grpo trial")
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    prompt_length = max(1, config.model.max_length - config.rollout.max_tokens)
    rows: list[Sample] = []
    left = tokens
    while left > 1:
        prompt = tuple(rng.randrange(vocabulary) for _ in range(min(prompt_length, left - 1)))
        left -= len(prompt)
        for _ in range(config.rollout.samples_per_prompt):
            count = min(config.rollout.max_tokens, left + 1)  # the last token is not forwarded
            if count < 1 or left < 1:
                break
            output = tuple(rng.randrange(vocabulary) for _ in range(count))
            left -= count - 1
            rows.append(Sample("trial", 0, prompt, output, (0.0,) * count, ((0, 0),), "stop", "", advantage=1.0))
    return rows


def _of_any_rank(cause: str) -> str:
    if not distributed.is_initialized():
        return cause
    found: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(found, cause)
    return next(filter(None, found), "")
