"""Tokens of a micro-batch by trial: never more than fit, nearly all that fit, the same on all ranks, kept by a run."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.trainer.compiling import made_up_rows
from grpo.trainer.packing import RowTokens, plan_minibatches
from grpo.trainer.token_budget import (
    FIRST,
    GRAIN,
    MOST,
    choose_tokens,
    fitting_tokens,
    kept_tokens,
    measure_tokens,
    most_laid_out,
    tokens_before,
)
from tests.models import random_samples, tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_policy_trainer import moving_parts, open_trainer, settings


@given(
    first=st.integers(FIRST, 20_000),
    fixed=st.floats(0, 2.5e8),
    token=st.floats(1e3, 1e8),
    room=st.floats(1e9, 2e11),
    bend=st.floats(0, 0.3),
)
def test_the_most_that_fits_is_found_without_trying_more(first, fixed, token, room, bend):
    """Of memory that grows with the tokens, a little faster by and by, above something that is always taken."""
    tried: list[int] = []

    def needs(tokens: int) -> float:
        return fixed + token * tokens * (1 + bend * tokens / MOST)

    def trial(tokens: int) -> float:
        tried.append(tokens)
        return room / needs(tokens)

    found = fitting_tokens(trial, first)
    assert all(needs(tokens) <= room * (1 + bend) for tokens in tried[1:])
    if needs(first) > room:
        assert found <= max(first * room / needs(first), 1)
        return
    assert needs(found) <= room * (1 + bend) and found <= max(MOST, first)
    assert found >= first // GRAIN * GRAIN
    more = max(found * 1.2 + GRAIN, first * 1.2)
    assert more > MOST or needs(int(more)) > room


class Vocabulary:
    vocab_size = 100


class Fake:
    """A device of which each token takes `each` bytes, whatever really runs."""

    def __init__(self, each: int, limit: int) -> None:
        self.each, self.most, self.tokens = each, limit, 0

    def limit(self) -> int:
        return self.most

    def held(self) -> int:
        return 1000

    def peak(self, call: Callable[[], None]) -> int:
        call()
        return 1000 + self.each * self.tokens


def measured(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """For each configuration: what is chosen, what was run, and whether the trainer is as it was before."""
    answers = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        meter = Fake(each=10 + 5 * rank, limit=1000 + 15 * 4500)
        sizes = []
        engine = trainer.engine

        def forward(packed: Any, engine: Any = engine, sizes: Any = sizes, meter: Any = meter) -> Any:
            meter.tokens = len(packed.input_ids_T)
            sizes.append(meter.tokens)
            return type(engine).__call__(engine, packed)

        class Spy:
            __call__ = staticmethod(forward)
            backward, step = engine.backward, engine.step

        before = moving_parts(trainer)
        chosen = measure_tokens(Spy(), trainer.policy, trainer.reference, config, trainer.device, meter)
        answers.append((chosen, sizes, moving_parts(trainer) == before, trainer.token_budget))
        assert choose_tokens(engine, trainer.policy, None, config, torch.device("cpu")) == 8192
        stats = trainer.step(random_samples(9), 1)
        assert stats["train/grad_norm"] > 0
    trainer.close()
    return answers


@pytest.mark.slow
def test_ranks_choose_what_the_smallest_has_room_for_and_nothing_stays(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    changes = [{"zero_stage": 1}, {"zero_stage": 3, "gradient_checkpointing": True}]
    configs = [
        settings(folder, train={"tokens_per_micro_batch": "auto"} | change, algorithm={"kl_coef": kl})
        for change, kl in zip(changes, (0.0, 0.1), strict=True)
    ]
    for answers in run_ranks(2, measured, free_port(), configs):
        for chosen, sizes, untouched, budget in answers:
            assert chosen == 4 * GRAIN, "rank 1 has room for 4500"
            assert untouched and budget == 8192
            assert [round(size, -2) for size in sizes[:3]] == [1000, 1000, 4100] and sizes[-1] == 1
            assert max(sizes) <= 4500


@pytest.mark.parametrize(
    ("given", "chosen", "before", "expected"),
    [
        ("auto", 30720, 29696, 29696),  # the run's own
        ("auto", 30720, 33000, 33000),  # within the margin
        ("auto", 30720, 65536, 30720),  # of a larger GPU
        ("auto", 30720, None, 30720),  # of a time before
        ("auto", 30720, 16, 30720),  # no row fits
        ("auto", 8192, 8192, 8192),
        (4096, 4096, 8192, 4096),  # as the configuration says
    ],
)
def test_a_run_keeps_what_it_began_with(given, chosen, before, expected):
    config = settings(Path("/model"), train={"tokens_per_micro_batch": given})
    assert kept_tokens(config, chosen, before) == expected


@pytest.mark.parametrize(
    ("header", "allowed", "expected"),
    [({"tokens_per_micro_batch": 29696}, (), 29696), ({}, (), 8192), ({}, ("train.tokens_per_micro_batch",), None)],
)
def test_a_run_of_a_time_before_had_the_number_that_auto_is_on_a_cpu(header, allowed, expected):
    train = {"tokens_per_micro_batch": "auto"}
    config = settings(Path("/model"), train=train, run={"allow_drift": allowed})
    assert tokens_before(config, header) == expected


@given(
    prompt=st.integers(8, 300), longest=st.integers(1, 300), count=st.integers(2, 16), tokens=st.integers(1024, 9000),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200), ranks=st.integers(1, 3),
)  # fmt: skip
def test_no_micro_batch_of_short_completions_is_larger_in_attention_than_the_trial(
    prompt, longest, count, tokens, lengths, ranks
):
    rollout = {"samples_per_prompt": count, "max_tokens": longest}
    model = {"max_length": prompt + longest}
    config = settings(Path("/model"), model=model, rollout=rollout, train={"tokens_per_micro_batch": "auto"})
    most = most_laid_out(config, tokens, torch.device("cuda"))
    policy: Any = SimpleNamespace(causal_lm=SimpleNamespace(config=SimpleNamespace(get_text_config=Vocabulary)))
    trial = sum(len(row.prompt_ids) + len(row.output_ids) - 1 for row in made_up_rows(config, policy, tokens))
    assert trial == pytest.approx(most, abs=count * prompt + longest)  # the last group is not whole
    batch = [RowTokens(row // count, prompt, min(length, longest) - 1) for row, length in enumerate(lengths)]
    (part,) = plan_minibatches(batch, ranks=ranks, minibatches=1, token_budget=tokens, seed="s", laid_out=most)
    for rows in (rows for mine in part.micro_batches for rows in mine):
        assert sum(sum(batch[row][1:]) for row in rows) <= most


def test_a_number_and_a_cpu_lay_out_as_many_as_there_are():
    for tokens, device in (("auto", "cpu"), (8192, "cuda")):
        config = settings(Path("/model"), train={"tokens_per_micro_batch": tokens})
        assert most_laid_out(config, 8192, torch.device(device)) == math.inf


@pytest.mark.parametrize(("length", "expected"), [(24, 8192), (10_000, 10_000)])
def test_on_a_cpu_auto_is_fixed(length, expected):
    config = settings(Path("/model"), model={"max_length": length}, train={"tokens_per_micro_batch": "auto"})
    assert choose_tokens(None, None, None, config, torch.device("cpu")) == expected  # type: ignore[arg-type]
    assert expected > FIRST
