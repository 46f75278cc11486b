"""Logprobs of rows that are scored once a step, shared by the ranks, and KL (k1) to the model that gave them."""

import math
import threading
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from grpo.algorithm.kl_control import KlController
from grpo.algorithm.needs import Needs
from grpo.algorithm.objective import policy_objective
from grpo.config import Config
from grpo.errors import NonFiniteError
from grpo.trainer import row_logprobs
from grpo.trainer.packing import plan_minibatches, row_tokens
from grpo.trainer.policy_trainer import PolicyTrainer
from grpo.trainer.row_logprobs import RowLogprobs
from grpo.types import Sample
from tests.models import random_samples

CPU = torch.device("cpu")
ROWS = random_samples(9)


class ByToken:
    """A policy whose logprob of a token depends on that token alone; it counts what it is asked."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, packed):
        self.rows.append(packed.rows)
        return packed.targets_C.float() * -0.125, torch.zeros(len(packed.targets_C))


def expected(sample) -> list[float]:
    return [sample.output_ids[place] * -0.125 for place in sample.trained_places]


def minibatches(ranks: int, rows=ROWS, skip=()):
    return plan_minibatches(
        [row_tokens(row) for row in rows], ranks=ranks, minibatches=2, token_budget=48, seed="0", skip=skip
    )


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_row_is_scored_once_a_step():
    policy = ByToken()
    known = RowLogprobs(policy, CPU)
    assert known.of(ROWS, (3, 1)).tolist() == expected(ROWS[3]) + expected(ROWS[1])
    assert known.of(ROWS, (1, 2)).tolist() == expected(ROWS[1]) + expected(ROWS[2])
    assert policy.rows == [2, 1]
    known.forget()
    known.of(ROWS, (1,))
    assert policy.rows == [2, 1, 1]


def test_all_rows_of_a_step_but_the_skipped_ones(alone):
    known = RowLogprobs(ByToken(), CPU)
    known.compute_all(ROWS, minibatches(1, skip=[4]), rank=0)
    assert sorted(known.known) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(values.tolist() == expected(ROWS[row]) for row, values in known.known.items())
    assert known.divergence(ROWS[4], 4) == 0.0


def test_ranks_share_the_work_and_each_knows_all(monkeypatch):
    """Two ranks in threads; their collective is a sum behind a barrier."""
    ranks, barrier, given = 2, threading.Barrier(2), {}

    def all_reduce(values):
        given[threading.current_thread().name] = values.clone()
        barrier.wait(30)
        values.copy_(sum(given.values()))

    monkeypatch.setattr(row_logprobs.distributed, "all_reduce", all_reduce)
    policies = [ByToken() for _ in range(ranks)]
    known = [RowLogprobs(policy, CPU) for policy in policies]
    threads = [
        threading.Thread(target=each.compute_all, args=(ROWS, minibatches(ranks), rank), name=str(rank))
        for rank, each in enumerate(known)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(sum(policy.rows) for policy in policies) == len(ROWS), "no row twice"
    assert len(policies[0].rows) == len(policies[1].rows), "as many forwards, fillers among them"
    for each in known:
        assert {row: values.tolist() for row, values in each.known.items()} == {
            row: expected(sample) for row, sample in enumerate(ROWS)
        }


def trainer_of(reference, rank: int, adapted: bool) -> PolicyTrainer:
    """What of a rank of two prepares a step."""
    trainer = object.__new__(PolicyTrainer)
    trainer.config = Config.model_validate(
        {"model": {"path": "-"}, "algorithm": {"kl_coef": 0.1}, "train": {"ranks": 2, "epochs": 2, "minibatches": 2}}
    )
    trainer.rank, trainer.world_size, trainer.token_budget, trainer.device = rank, 2, 48, CPU
    trainer.objective, trainer.needs = SimpleNamespace(corrected=False), Needs(reference=True, zero_advantage_rows=True)
    trainer.reference, trainer.start = reference, RowLogprobs(ByToken(), CPU)
    trainer.weights, trainer.clock = SimpleNamespace(adapted={"layer": None} if adapted else {}), defaultdict(float)
    return trainer


@pytest.mark.parametrize("adapted", [True, False])
def test_below_an_adapter_no_rank_scores_while_another_does_not(monkeypatch, adapted):
    """At stage 3 each forward of the policy is a collective, and ranks have other numbers of rows to look up."""
    monkeypatch.setattr(row_logprobs.distributed, "all_reduce", lambda values: None)
    found = []
    for rank in range(2):
        policy = ByToken()
        trainer = trainer_of(RowLogprobs(policy, CPU), rank, adapted)
        assert trainer._prepare(ROWS, step=1) is ROWS
        before = len(policy.rows)
        for epoch in range(2):
            for minibatch in trainer._minibatches(ROWS, 1, epoch):
                for rows in filter(None, minibatch.micro_batches[rank]):
                    trainer.reference.of(ROWS, rows)
        found.append((before, len(policy.rows) - before))
    if adapted:
        assert found[0] == found[1] and found[0][0] > 0 == found[0][1], "all in step, and before the updates"
    else:
        assert found[0][1] != found[1][1], "a model of its own is asked for what is missing"


def test_k1_is_sampler_less_reference_over_the_trained_tokens():
    sample = replace(
        ROWS[0], output_ids=(8, 16, 24, 32), logprobs=(-1.5, -9.0, -2.5, -4.25), trained=(True, False, True, True)
    )
    known = RowLogprobs(ByToken(), CPU)
    known.compute([sample], (0,))
    assert known.divergence(sample, 0) == -0.5 + 0.5 - 0.25
    unknown = replace(sample, logprobs=(-1.5, -9.0, math.nan, -4.25))
    assert known.divergence(unknown, 0) == -0.5 - 0.25, "what the sampler does not know counts 0"


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_refused_by_name(broken):
    sample = replace(ROWS[0], output_ids=(8, 16), logprobs=(-1.0, math.nan), prompt_id="p7", index=3)
    known = RowLogprobs(ByToken(), CPU)
    known.known[0] = torch.tensor([broken, -2.0])
    with pytest.raises(NonFiniteError, match=r"KL to the reference must be finite .* for sample 3 of prompt p7; use"):
        known.divergence(sample, 0)
    known.known[0] = torch.tensor([-2.0, broken])
    assert known.divergence(sample, 0) == 1.0, "where the sampler is unknown nothing is compared"


def drawn(prompt: str, index: int, reward: float, output: tuple[int, ...], *logprobs: float, **more) -> Sample:
    return Sample(prompt, index, (1,), output, logprobs, ((0, 0),), "stop", "", reward, 0.0, **more)


@pytest.mark.parametrize(("kl", "expected"), [("k1", [0.875, -0.875, -0.25, 0.25]), ("k2", [0.0] * 4)])
def test_the_rewards_of_a_step_lose_their_kl_by_the_controllers_coefficient(alone, kl, expected):
    """KL -1 and 0.5 in one group, 1 in the other: rewards 1.5 and -0.25, 0.5 and the masked one's 1."""
    batch = [
        drawn("p", 0, 1.0, (8, 16), -1.5, -2.5),
        drawn("p", 1, 0.0, (8,), -0.5),
        drawn("q", 0, 1.0, (24,), -2.0),
        drawn("q", 1, 1.0, (24, 8), -9.0, -9.0, masked=True),
    ]
    trainer = trainer_of(RowLogprobs(ByToken(), CPU), 0, adapted=False)
    algorithm = {"kl": kl, "kl_coef": 0.1, "kl_target": 0.2, "advantage_std": "none"}
    trainer.config = Config.model_validate({"model": {"path": "-"}, "algorithm": algorithm})
    trainer.world_size, trainer.objective = 1, policy_objective(trainer.config)
    trainer.control = KlController(trainer.config.algorithm)
    trainer.control.coef = 0.5
    trainer.token_budget = 2048
    prepared = trainer._prepare(batch, step=1)
    assert [sample.advantage for sample in prepared] == expected
    assert sorted(trainer.reference.known) == ([0, 1, 2] if kl == "k1" else [])
    assert [sample.reward for sample in prepared] == [1.0, 0.0, 1.0, 1.0]
