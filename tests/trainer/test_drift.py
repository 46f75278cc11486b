"""Rows of older versions: what a checkpoint keeps of them. What ranks measure together is in test_policy_trainer.py."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from grpo.config import Config
from grpo.errors import CheckpointError
from grpo.trainer import rng
from grpo.trainer.drift import Drift
from grpo.trainer.model import Policy, make_policy
from grpo.trainer.row_logprobs import scored
from grpo.trainer.state import StateFolder, drift_file, rng_file
from grpo.types import Sample
from tests.models import random_samples, tiny_model

CPU = torch.device("cpu")
CONFIG = {"model": {"path": "x"}, "rollout": {"max_staleness": 2}}


@pytest.fixture
def drift_of(monkeypatch):
    def make(rank: int, ranks: int, policy: Policy | None = None, **sections) -> Drift:
        group = SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: ranks, all_reduce=lambda tensor: None)
        monkeypatch.setattr("grpo.trainer.drift.distributed", group)
        return Drift(Config.model_validate(CONFIG | sections), policy, CPU)

    return make


def row(number: int, trained: tuple[bool, ...] | None = None) -> Sample:
    ids = (5, 6, number)
    logprobs, span = (-0.5,) * 3, ((0, 4),)
    return Sample("p:1", number, (1, 2), ids, logprobs, span, "stop", "x", advantage=1.0, trained=trained)


def scores(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def kept(drift: Drift) -> dict[int, list[tuple]]:
    """What a score follows from, and what it was."""
    return {
        version: [
            (one.prompt_ids, one.output_ids, one.trained, one.trained_tokens, values.tolist()) for one, values in rows
        ]
        for version, rows in drift.kept.items()
    }


def dumped(drift_of, ranks: int) -> tuple[list[str], list[dict[int, list[tuple]]]]:
    """Of ranks of which the last had nothing to train in version 5."""
    texts, all_kept = [], []
    for rank in range(ranks):
        drift = drift_of(rank, ranks)
        drift.keep(4, [row(rank), row(9, (True, False, True))], scores(-0.1, -1 / 3, -2e-30, -7.0, -0.0))
        drift.keep(5, [] if rank == ranks - 1 else [row(8)], scores(*[] if rank == ranks - 1 else (-1.0, -2.0, -3.0)))
        texts.append(drift.dump())
        all_kept.append(kept(drift))
    return texts, all_kept


def test_as_many_ranks_go_on_with_their_own_rows_bit_for_bit(drift_of) -> None:
    texts, before = dumped(drift_of, 2)
    for rank in range(2):
        again = drift_of(rank, 2)
        again.restore(texts)
        assert kept(again) == before[rank] and len(before[rank][4]) == 2
        assert again.dump() == texts[rank]
        assert all(values.dtype == torch.float32 for rows in again.kept.values() for _, values in rows)


def test_what_a_resumed_rank_measures_is_what_it_would_have_measured(drift_of) -> None:
    policy = make_policy(tiny_model(), temperature=1.0)
    samples = [
        replace(sample, trained=(True,) + (False,) * (len(sample.output_ids) - 2) + (True,))
        if len(sample.output_ids) > 4
        else sample
        for sample in random_samples(9)
    ]
    drift = drift_of(0, 1, policy)
    drift.keep(4, samples, torch.cat(scored(policy, samples, CPU)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    again = drift_of(0, 1, policy)
    assert again.since(4) is None, "as it was without the rows: nothing was checked"
    again.restore([drift.dump()])
    assert again.since(4) == again.since(5) == drift.since(4) > 1e-3 and again.since(3) is None


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_state_folder_holds_the_rows_and_names_damage(drift_of, alone, tmp_path) -> None:
    texts, before = dumped(drift_of, 2)
    folder = tmp_path / "state"
    folder.mkdir()
    state = StateFolder(folder, {}, [], None)
    state.write({"counters": {}, "step": 5}, {rng_file(0): rng.capture(CPU), drift_file(0): texts[0]})
    drift = drift_of(0, 1)
    assert state.read(drift=drift, device=CPU)["step"] == 5
    assert kept(drift) == before[0]
    (folder / drift_file(0)).write_text("{")
    with pytest.raises(CheckpointError, match="drift-00000.json it and those of the other ranks do not hold rows"):
        state.read(CPU, drift)
    (folder / drift_file(0)).unlink()
    state.read(CPU, drift)
    assert drift.kept == {}, "an older checkpoint has no such file"


def test_fewer_ranks_keep_what_one_has_room_for_and_as_many_all(drift_of) -> None:
    """A prompt that rows share was forwarded once: their lengths add up to more than a micro-batch held."""
    texts, before = dumped(drift_of, 2)  # two rows of five tokens each of version 4
    for rank in range(2):
        again = drift_of(rank, 2)
        again.budget = 6
        again.restore(texts)
        assert kept(again) == before[rank]
    alone = drift_of(0, 1)
    alone.budget = 16
    alone.restore(texts)
    assert [len(rows) for rows in alone.kept.values()] == [3, 1], "15 tokens of 16"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_other_ranks_share_the_rows_and_agree_on_the_versions(drift_of, ranks: int) -> None:
    """A rank that did not know a version would leave the others waiting in the collective that measures it."""
    texts, before = dumped(drift_of, 3)
    found = []
    for rank in range(ranks):
        drift = drift_of(rank, ranks)
        drift.restore(texts)
        found.append(kept(drift))
    assert [[*each] for each in found] == [[4, 5]] * ranks
    for version in (4, 5):
        assert sorted(map(str, sum((each[version] for each in found), []))) == sorted(
            map(str, sum((each[version] for each in before), []))
        )


def test_a_checkpoint_without_rows_and_a_run_without_older_samples_keep_none(drift_of) -> None:
    texts, _ = dumped(drift_of, 1)
    drift = drift_of(0, 1)
    drift.restore(texts)
    drift.restore([])
    assert drift.kept == {}
    synchronous = drift_of(0, 1, rollout={"max_staleness": 0})
    synchronous.restore(texts)
    assert synchronous.kept == {}


@pytest.mark.parametrize(
    "texts",
    [
        ["{"],
        ["[]"],
        ['{"4": 1}'],
        ['{"x": []}'],
        ['{"4": [[[1], [2], null]]}'],
        ['{"4": [[[1], [2], null, ["a"]]]}'],
        ['{"4": [[[1], [2], null, [-1.0, -1.0]]]}'],
        ['{"4": []}', '{"5": []}'],
    ],
)
def test_damaged_rows_are_refused(drift_of, texts: list[str]) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        drift_of(0, 1).restore(texts)


def test_rows_are_json(drift_of) -> None:
    drift = drift_of(0, 1)
    drift.keep(4, [row(3, (True, False, False))], scores(-0.25))
    assert json.loads(drift.dump()) == {"4": [[[1, 2], [5, 6, 3], [True, False, False], [-0.25]]]}
