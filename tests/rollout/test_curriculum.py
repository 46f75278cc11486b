"""A curriculum in the loop: its choice is the same whatever takes long, is lost, or resumes, and the books prove it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.config.engines import EngineRange
from grpo.controller import Controller
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import AuditError, GrpoError
from grpo.interfaces import Batch
from grpo.observe.audit import audit
from grpo.rollout.drawing import Draw, Drawer, teaching
from grpo.rollout.drawn import load_drawn
from grpo.types import Group, Prompt, Sample
from tests.fakes import FakeRollouts, FakeWeights, prompt, sample
from tests.observe.recorders import rows_of
from tests.rollout.simulated import Loop, Parity, make_config
from tests.rollout.test_no_bias import MODES, Fate, run, settled

SIZE = 7
RULE = {"curriculum": {"easy_fraction": 0.1, "hard_fraction": 0.2}}


def simulated(config: Config, **how: Any) -> Loop:
    """Outcomes depend on the weights, and weights on all that was trained before."""
    prompts = PromptStream([Prompt(f"fake:{row}", "q", "a", (1, row)) for row in range(SIZE)], config.run.seed)
    prompts.follow(config.data.curriculum)
    return Loop(config, prompts=prompts, **how)


def seen(batches: Mapping[int, Batch]) -> list[object]:
    return [
        ([group.prompt.id for group in batch.groups], [group.prompt.id for group in batch.skipped], batch.not_drawn)
        for _, batch in sorted(batches.items())
    ]


def of_modes(staleness: int, update: str = "between_batches", refill: bool = False, steps: int = 12) -> Config:
    return make_config(staleness, update, steps, rollout={"refill": refill}, data=RULE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.booleans(), st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=5, max_size=5))
def test_whatever_takes_long_the_run_is_the_same(
    staleness: int, refill: bool, delays: list[tuple[int, int, int]]
) -> None:
    places = {"sample": 0, "score": 1, "train": 2}
    config = of_modes(staleness, refill=refill)
    quick = simulated(config).run(12)
    slow = simulated(config, delay=lambda what, step: 0.001 * delays[step % 5][places[what]]).run(12)
    assert slow.history == quick.history and seen(slow.batches) == seen(quick.batches)
    assert sum(len(batch.not_drawn) for batch in quick.batches.values()) > 3
    assert slow.batches[12].prompts == quick.batches[12].prompts
    assert json.dumps(slow.collector.recorded(12)) == json.dumps(quick.collector.recorded(12))


def test_a_choice_ahead_knows_as_much_as_its_clock_says() -> None:
    """The prompts of a batch follow from the outcomes of batches that are s + 1 before it, and of no later one."""
    for staleness in (0, 2):
        loop = simulated(of_modes(staleness)).run(12)
        stream = PromptStream([Prompt(f"fake:{row}", "q", "a", (1, row)) for row in range(SIZE)], 0)
        stream.follow(loop.config.data.curriculum)
        for step, batch in sorted(loop.batches.items()):
            chosen = stream.choose(3, step - 1 - staleness)
            assert [group.prompt.id for group in batch.groups] == [each.id for each in chosen.prompts]
            assert list(batch.not_drawn) == chosen.skipped
            stream.record(step, [(group.prompt.id, group.right(1.0), 2) for group in batch.groups])


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_resume_anywhere_is_no_resume(staleness: int, refill: bool) -> None:
    config = of_modes(staleness, refill=refill)
    whole = simulated(config)
    whole.resume(whole.start)
    states = [whole.advance() for _ in range(12)]
    kept = [state() for state in states]
    whole.close()
    for at in range(1, 12):
        state = kept[at - 1]
        again = simulated(config)
        again.resume(replace(state, prompts=json.loads(json.dumps(state.prompts))))
        while again.step < 12:
            again.advance()
        again.close()
        assert again.history[12] == whole.history[12], at
        assert seen(again.batches) == seen(whole.batches)[at:]
        assert again.batches[12].prompts == whole.batches[12].prompts
        assert json.dumps(again.collector.recorded(12)) == json.dumps(whole.collector.recorded(12))
        shares = [
            [batch.stats[f"curriculum/skipped_{each}"] for each in ("easy", "hard")]
            for loop in (again, whole)
            for batch in [loop.batches[min(at + 1, 12)]]
        ]
        assert shares[0] == shares[1]


def test_a_loop_that_goes_back_forgets_what_it_had_recorded_ahead() -> None:
    """A lost trainer: the feeder is in the middle of a batch."""
    config = of_modes(2)
    whole = simulated(config).run(12)
    loop = simulated(config, delay=lambda what, step: 0.005)
    loop.resume(loop.start)
    states = [loop.advance() for _ in range(8)]
    second = states[2]()
    loop.resume(second)
    while loop.step < 12:
        loop.advance()
    loop.close()
    assert loop.history == whole.history


def test_what_was_drawn_by_another_rule_is_drawn_again() -> None:
    loop = simulated(of_modes(2))
    loop.resume(loop.start)
    state = [loop.advance() for _ in range(5)][4]()
    loop.close()
    assert load_drawn(state.drawn).rule["curriculum"]
    other = make_config(2, steps=12, data={"curriculum": {"easy_fraction": 0.1, "hard_fraction": 0.9}})
    again = simulated(other)
    again.resume(state)
    assert again.engines.asked == [] and again.collector._sampled == 5  # type: ignore[attr-defined]
    again.advance()
    again.close()


def test_without_a_curriculum_nothing_is_new() -> None:
    for mode in ("between_batches", "in_flight"):
        loop = simulated(make_config(1, mode))
        loop.run(6)
        assert all(batch.not_drawn == [] for batch in loop.batches.values())
        assert not any("curriculum" in key for batch in loop.batches.values() for key in (*batch.stats, *batch.prompts))
        assert loop.collector.recorded(6) == {}
        stream = PromptStream([Prompt(f"fake:{row}", "q", "a", (1, row)) for row in range(SIZE)], 0)
        assert [group.prompt.id for batch in loop.batches.values() for group in batch.groups] == [
            each.id for each in stream.take(18)
        ]
        assert "skipped" not in loop.batches[6].prompts


# Shares of a batch, exactly


def test_shares_of_turns_and_of_groups_that_teach_are_exact() -> None:
    config = make_config(0, data={"curriculum": {"easy_fraction": 0.01, "hard_fraction": 0.01}})
    weights = FakeWeights([])
    weights.publish(0)
    stream = PromptStream([prompt(number) for number in range(4)], 0)
    stream.follow(config.data.curriculum)
    stream.record(0 + 1, [("fake:0", 2, 2), ("fake:1", 0, 2)])
    drawer = Drawer(config, stream, FakeRollouts([], weights), Parity())
    draw = Draw(2)
    prompts = drawer.take(draw)
    groups = [scored(each, rewards) for each, rewards in zip(prompts, ([1, 0], [1, 1], [0, 0]), strict=True)]
    draw.kept.extend(groups)
    batch = drawer.batch(draw)
    turns = len(draw.not_drawn) + 3
    easy = sum(why == "easy" for _, why in draw.not_drawn)
    assert {name for name, _ in draw.not_drawn} <= {"fake:0", "fake:1"} and draw.not_drawn
    assert batch.stats == {
        "rollout/effective_groups": pytest.approx(1 / 3),
        "curriculum/skipped_easy": easy / turns,
        "curriculum/skipped_hard": (len(draw.not_drawn) - easy) / turns,
    }
    known = stream.recorded(2)["curriculum"]
    assert isinstance(known, dict)
    last = {name: entries[-1] for name, entries in known.items() if entries[-1][0] == 2}
    expected = {each.id: (2, right, 2) for each, right in zip(prompts, (1, 2, 0), strict=True)}
    assert last == expected or len({each.id for each in prompts}) < 3


def scored(of: Prompt, rewards: Sequence[float]) -> Group:
    return Group(of, tuple(replace(sample(of, at, 0), reward=float(reward)) for at, reward in enumerate(rewards)))


def test_a_group_teaches_if_a_sample_that_is_trained_has_an_advantage() -> None:
    groups = [scored(prompt(number), [0, 0]) for number in range(3)]

    def row(of: int, advantage: float | None, masked: bool = False) -> Sample:
        return replace(groups[of].samples[0], advantage=advantage, masked=masked)

    rows = [row(0, 0.0), row(0, 0.0), row(1, 0.5, masked=True), row(1, 0.0), row(2, -0.5), row(2, 0.5)]
    assert teaching(groups, rows) == 1
    assert teaching([], []) == 0


# All of the product but its actors


def books(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run_dir, "books.jsonl") if row["event"] == "step"]


def choice(run_dir: Path) -> list[object]:
    return [(row["prompts"], row.get("skipped"), row["curriculum"]) for row in books(run_dir)]


class Killed(Exception):
    """As by a signal: nobody catches it."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("refill", [False, True])
def test_killed_and_resumed_the_books_are_those_of_a_run_that_was_not(
    mode: tuple[str, int], refill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(mode, refill, curriculum=True, steps=10)
    run(config, Fate(), tmp_path / "whole")
    proof = audit(tmp_path / "whole")
    assert proof.steps == 10 and proof.not_drawn == sum(
        len(row["curriculum"]["not_drawn"]) for row in books(tmp_path / "whole")
    )
    assert proof.not_drawn > 3
    for at in (3, 8):
        dies(monkeypatch, at)
        with pytest.raises(Killed):
            run(config, Fate(milliseconds=(0, 5, 2)), tmp_path / "again")
        monkeypatch.undo()
    run(config, Fate(milliseconds=(3, 0)), tmp_path / "again")
    assert choice(tmp_path / "again") == choice(tmp_path / "whole")
    again = audit(tmp_path / "again")
    assert (again.starts, again.not_drawn, again.prompts, again.notes) == (3, proof.not_drawn, proof.prompts, [])


def dies(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The driver, in the middle of a step; the commit under way ends, as no thread outlives a real one."""
    learn = Controller.learn

    def until(self: Controller, batch: Batch, at: int) -> Any:
        if at == step:
            self.finish_commit()
            raise Killed
        return learn(self, batch, at)

    monkeypatch.setattr(Controller, "learn", until)


MUTANTS = (
    "knows too early",
    "knows too late",
    "other coin",
    "ignores it",
    "skips without cause",
    "forgets at a resume",
)


@pytest.mark.parametrize("mode", [("between_batches", 0), ("between_batches", 2), ("in_flight", 2)])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_who_chooses_otherwise_is_found(
    mode: tuple[str, int], mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(mode, refill=False, curriculum=True, steps=10)
    choose, restore = PromptStream.choose, PromptStream.restore
    with monkeypatch.context() as patch:
        if mutant == "knows too early":
            if mode[1] == 0:
                pytest.skip("there is nothing earlier to be known")
            patch.setattr(PromptStream, "choose", lambda self, count, known=0: choose(self, count, known + 1))
        elif mutant == "knows too late":
            patch.setattr(PromptStream, "choose", lambda self, count, known=0: choose(self, count, known - 1))
        elif mutant == "other coin":
            patch.setattr("grpo.data.stream.KEY", "coin")
        elif mutant == "ignores it":
            patch.setattr(PromptStream, "choose", lambda self, count, known=0: choose(self, count, 0))
        elif mutant == "skips without cause":
            patch.setattr("grpo.data.curriculum.PassRates.difficulty", lambda self, name, known: "hard")
        else:
            dies(patch, 8)
            with pytest.raises(Killed):
                run(config, Fate(), tmp_path)
            patch.undo()
            patch.setattr(PromptStream, "restore", lambda self, state: restore(self, {**state, "curriculum": {}}))
        try:
            run(config, Fate(), tmp_path)
        except GrpoError:
            return  # it found itself
    with pytest.raises(AuditError, match=r"curriculum skips a turn|stands where|agrees with the books"):
        audit(tmp_path)


def test_what_is_counted_is_what_the_rows_say(tmp_path: Path) -> None:
    config = settled(("between_batches", 1), refill=True, curriculum=True, steps=10)
    run(config, Fate(), tmp_path)
    metrics = [row for row in rows_of(tmp_path) if row["event"] == "step"]
    assert len(metrics) == 10
    for row, booked in zip(metrics, books(tmp_path), strict=True):
        turns = booked["curriculum"]["not_drawn"]
        taken = len(booked["prompts"]) + len(booked.get("skipped", ()))
        why = Counter(reason for _, reason in turns)
        for each in ("easy", "hard"):
            assert row[f"curriculum/skipped_{each}"] == why[each] / (len(turns) + taken)
        right = booked["curriculum"]["right"]
        assert row["rollout/effective_groups"] == sum(0 < one < of for one, of in right) / taken
    assert sum(row["curriculum/skipped_easy"] for row in metrics) > 0


RULES = [
    {"easy_fraction": 0.1},
    {"easy_fraction": 0.3, "window": 3, "easy_threshold": 0.7},
    None,
    {"hard_fraction": 0.01},
]


@pytest.mark.parametrize("staleness", [(0, 0, 0, 0), (2, 2, 2, 2), (0, 3, 1, 0), (3, 0, 2, 2)])
def test_other_rules_and_clocks_from_a_resume_on_are_proved_too(staleness: tuple[int, ...], tmp_path: Path) -> None:
    """`run.allow_drift`: rules that change, end and begin; what was drawn by another one is drawn again."""
    for start, (steps, rule, s) in enumerate(zip((5, 10, 15, 25), RULES, staleness, strict=True), start=1):
        rollout = {"prompts_per_step": 3, "samples_per_prompt": 2, "engines": 2}
        own = {"checkpoint": {"every": 2, "keep": 99}, "data": {"curriculum": rule}}
        run(make_config(s, steps=steps, rollout=rollout, **own), Fate(), tmp_path)
        proof = audit(tmp_path)
        assert (proof.steps, proof.starts, proof.prompts, proof.notes) == (steps, start, 3 * steps, [])
    some = {row["step"] for row in rows_of(tmp_path, "books.jsonl") if row.get("curriculum", {}).get("not_drawn")}
    assert any(step <= 10 for step in some) and any(step > 15 for step in some)
    assert not any(10 < step <= 15 for step in some)


def two_sources() -> MixedStream:
    """Of three prompts two are of the smaller source."""
    sizes = {"a": 3, "b": 5}
    made = {
        name: PromptStream([Prompt(f"{name}:{row}", "q", "a", (1, row), name) for row in range(1, size + 1)], 0)
        for name, size in sizes.items()
    }
    return MixedStream(made, {"a": 2.0, "b": 1.0})


@pytest.mark.parametrize("mode", [("between_batches", 0), ("between_batches", 2), ("in_flight", 2)])
def test_several_sources_keep_their_shares_and_are_proved(
    mode: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(mode, refill=False, curriculum=True, steps=10)
    run(config, Fate(), tmp_path / "whole", stream=two_sources())
    dies(monkeypatch, 6)
    with pytest.raises(Killed):
        run(config, Fate(), tmp_path / "again", stream=two_sources())
    monkeypatch.undo()
    run(config, Fate(), tmp_path / "again", stream=two_sources())
    assert choice(tmp_path / "again") == choice(tmp_path / "whole")
    for run_dir in (tmp_path / "whole", tmp_path / "again"):
        assert audit(run_dir).not_drawn > 3
    trained = Counter(name[0] for row in books(tmp_path / "again") for name in row["prompts"])
    assert trained == {"a": 20, "b": 10}


class LosesSome(Parity):
    """Reward code fails for a sample of each third prompt, and for a whole group of each fourth."""

    lost = 0

    def score(self, groups: Sequence[Group]) -> list[Group]:
        scored = super().score(groups)
        left = [group for group in scored if int(group.prompt.id[5:]) % 4] or scored
        self.lost = len(scored) - len(left)
        return [replace(group, samples=group.samples[int(group.prompt.id[5:]) % 3 == 0 :]) for group in left]

    def failures(self) -> dict[str, float]:
        return {"reward/dropped_groups": float(self.lost)}


@pytest.mark.parametrize("mode", [("between_batches", 0), ("between_batches", 2)])
@pytest.mark.parametrize("refill", [False, True])
def test_rewards_that_fail_count_in_no_pass_rate(
    mode: tuple[str, int], refill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(mode, refill, curriculum=True, steps=10)
    run(config, Fate(), tmp_path / "whole", rewards=LosesSome())
    dies(monkeypatch, 6)
    with pytest.raises(Killed):
        run(config, Fate(), tmp_path / "again", rewards=LosesSome())
    monkeypatch.undo()
    run(config, Fate(milliseconds=(4, 0)), tmp_path / "again", rewards=LosesSome())
    assert choice(tmp_path / "again") == choice(tmp_path / "whole")
    proof = audit(tmp_path / "again")
    assert proof.steps == 10 and proof.not_drawn > 0
    sizes = {of for row in books(tmp_path / "again") for _, of in row["curriculum"]["right"]}
    assert sizes == {1, 2}
    for row, booked in zip(
        [row for row in rows_of(tmp_path / "again") if row["event"] == "step"], books(tmp_path / "again"), strict=True
    ):
        turns = booked["curriculum"]["not_drawn"]
        taken = len(booked["prompts"]) + len(booked.get("skipped", ())) + booked.get("dropped", 0)
        assert row["curriculum/skipped_easy"] == [why for _, why in turns].count("easy") / (taken + len(turns))


@pytest.mark.parametrize("mode", [("between_batches", 0), ("between_batches", 2), ("in_flight", 2)])
def test_engines_that_come_and_go_change_no_choice(mode: tuple[str, int], tmp_path: Path) -> None:
    fixed = settled(mode, refill=False, curriculum=True, steps=10)
    run(fixed, Fate(), tmp_path / "fixed")
    rollout = fixed.rollout.model_copy(update={"engines": EngineRange(min=1, max=3)})
    elastic = fixed.model_copy(update={"rollout": rollout})
    assert elastic.rollout.elastic
    lost = frozenset({("generate", 2), ("generate", 7), ("receive_weights", 3)})
    run(elastic, Fate(milliseconds=(0, 6, 1), losses=lost), tmp_path / "elastic")
    assert choice(tmp_path / "elastic") == choice(tmp_path / "fixed")
    assert audit(tmp_path / "elastic").not_drawn > 3
