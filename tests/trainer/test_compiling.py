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
from tests.trainer.test_policy_trainer import ROWS, open_trainer, settings

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


def trained(rank: int, world_size: int, port: int, configs: list[Config], folder: Path) -> list[Any]:
    """For each configuration: weights after a step, graphs by then and after two more; at last what a resume says."""
    compiling.BACKEND = "aot_eager"
    answers: list[Any] = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        trainer.policy.causal_lm.get_output_embeddings().fused = True
        trainer.step(ROWS, 1)
        weights = {name: tensor.float().numpy(force=True).copy() for name, tensor in trainer.iter_weights()}
        graphs = [counters["stats"]["unique_graphs"]]
        for step in (2, 3):
            trainer.step(random_samples(9 + step, seed=step), step)
            graphs.append(counters["stats"]["unique_graphs"])
        answers.append((weights, graphs, trainer.notes, trainer.policy.compiled))
        if config.train.compile is False:
            trainer.save_state(folder)
    answers.append(trainer.load_state(folder))
    trainer.close()
    return answers


@pytest.mark.slow
def test_ranks_train_alike_and_compile_nothing_after_the_first_step(tmp_path: Path) -> None:
    """At stage 2, with recomputed layers, a reference and samples of all sizes, as without at stage 1."""
    folder = tiny_folder(tmp_path / "model")
    changes = [{"zero_stage": 1, "compile": False}]
    changes.append({"zero_stage": 2, "compile": True, "gradient_checkpointing": True})
    configs = [settings(folder, train=change, algorithm={"kl_coef": 0.1}) for change in changes]
    (tmp_path / "state").mkdir()
    for answers in run_ranks(2, trained, free_port(), configs, tmp_path / "state"):
        (plain, _, _, _), (found, graphs, notes, compiled), said = answers
        for name, weights in plain.items():
            numpy.testing.assert_allclose(found[name], weights, atol=1e-4)
        assert compiled and notes == () and graphs[0] >= 6 and len(set(graphs)) == 1
        assert len(said) == 1 and "layers were uncompiled before and are compiled now" in said[0]


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


def test_auto_says_why_it_compiles_nothing():
    config = settings(Path("/model"), train={"zero_stage": 3})
    policy = make_policy(tiny_model(), 1.0)
    (line,) = compiling.compile_where_wanted(policy, config, torch.device("cuda"))
    assert line.startswith("note: ") and "train.zero_stage 3" in line and not policy.compiled
    assert compiling.compile_where_wanted(policy, config, torch.device("cpu")) == ()


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
    prompts = [row.prompt_ids for row in made[::rows]]
    shared = sum(map(len, prompts)) - sum(map(len, set(prompts)))  # short prompts may come again
    assert tokens - 2 - shared <= len(pack(made).input_ids_T) <= tokens
