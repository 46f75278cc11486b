"""Layers under torch.compile, on the CPU: the numbers of the plain ones, compiled once, given up where it fails."""

import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from grpo.config import Config
from grpo.trainer import compiling
from grpo.trainer.model import make_policy
from grpo.trainer.packing import pack
from tests.models import random_samples, tiny_folder, tiny_model
from tests.ranks import free_port, run_ranks
from tests.trainer.test_policy_trainer import ROWS, settings, train_once

CONFIG = settings(Path("/model"), train={"compile": True})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.reset()


def computed(policy: Any, count: int) -> tuple[Any, ...]:
    policy.zero_grad()
    logprobs_C, entropy_C = policy(pack(random_samples(count)))
    (logprobs_C.sin() + entropy_C).sum().backward()
    return logprobs_C.detach(), entropy_C.detach(), {name: param.grad for name, param in policy.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointing"), [("qwen2", False), ("llama", True)])
def test_the_same_numbers_and_no_compilation_after_the_trial(kind, checkpointing, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    policies = [make_policy(tiny_model(kind), 0.7, checkpointing) for _ in range(2)]
    plain, policy = policies
    for each in policies:
        each.entropy_gradient = each.causal_lm.get_output_embeddings().fused = True
    assert compiling.try_compiling(policy, CONFIG) == ""
    assert policy.compiled and all(param.grad is None for param in policy.parameters())
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 6, "four pieces of a layer, two of the head"
    for count in (13, 7, 1, 2, 20, 0, 5):
        found = computed(policy, count)
        torch.testing.assert_close(found, computed(plain, count), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            alone_C, _ = policy(pack(random_samples(count)), temperature=0.7)
        assert torch.equal(alone_C, found[0]) and not alone_C.requires_grad
    assert counters["stats"]["unique_graphs"] == graphs


def fails_forward(graph: Any, inputs: Any) -> Any:
    raise OSError("no compiler is here\nand more")


def fails_backward(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    def backward(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler is here")

    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=backward)(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [fails_forward, fails_backward])
def test_what_cannot_be_compiled_runs_as_it_is(backend, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", backend)
    plain, policy = (make_policy(tiny_model(), 0.7) for _ in range(2))
    cause = compiling.try_compiling(policy, CONFIG)
    assert "no compiler is here" in cause and "\n" not in cause
    assert not policy.compiled and all(param.grad is None for param in policy.parameters())
    for count in (7, 0):
        for left, right in zip(computed(policy, count)[:2], computed(plain, count)[:2], strict=True):
            assert torch.equal(left, right)


def compiled_once(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    compiling.BACKEND = "aot_eager"
    return train_once(rank, world_size, port, [(config, ROWS) for config in configs])


@pytest.mark.slow
def test_two_ranks_make_the_same_update(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    configs = [settings(folder, train={"zero_stage": 1, "compile": on}) for on in (False, True)]
    for (plain, weights, _), (found, moved, _) in run_ranks(2, compiled_once, free_port(), configs):
        for name, gradient in plain[0].items():
            numpy.testing.assert_allclose(found[0][name], gradient, atol=1e-5, rtol=1e-4)
            numpy.testing.assert_allclose(moved[name], weights[name], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "device", "stage", "expected"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 2, True),
        ("auto", "cuda", 3, False),
        ("auto", "cpu", 0, False),
        (True, "cpu", 1, True),
        (False, "cuda", 1, False),
    ],
)
def test_auto_compiles_on_gpus_where_weights_are_whole(given, device, stage, expected):
    config = settings(Path("/model"), train={"compile": given, "zero_stage": stage})
    assert compiling.wanted(config, torch.device(device)) is expected


def test_compiled_layers_and_cut_weights_are_refused():
    with pytest.raises(ValueError, match=r"train\.compile is true and train\.zero_stage 3"):
        settings(Path("/model"), train={"compile": True, "zero_stage": 3})


def test_kernels_stay_in_the_users_cache_unless_told_otherwise(tmp_path, monkeypatch):
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiling.keep_kernels()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "grpo" / "inductor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiling.cache_folder() == tmp_path / "home/.cache/grpo/inductor"


@tries(max_examples=50)
@given(tokens=st.integers(8, 300), length=st.integers(8, 60), share=st.floats(0.1, 0.9), rows=st.integers(2, 9))
def test_made_up_rows_fill_the_budget_as_a_step_would(tokens, length, share, rows):
    most = max(1, int(length * share))
    config = settings(
        Path("/model"),
        model={"max_length": length},
        rollout={"max_tokens": min(most, length - 1), "samples_per_prompt": rows},
        train={"tokens_per_micro_batch": max(tokens, length)},
    )
    made = compiling.made_up_rows(config, make_policy(tiny_model(), 1.0), tokens)
    assert all(len(row.prompt_ids) + len(row.output_ids) <= length and row.output_ids for row in made)
    assert tokens - 2 <= len(pack(made).input_ids_T) <= tokens
