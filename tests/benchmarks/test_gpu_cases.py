import pytest

from benchmarks.gpu.cases import Case, Phase, cases_named, groups_of, lengths_named, phases_of


def test_a_case_is_a_mode_with_levers() -> None:
    found = cases_named("s0, s2+e1+plain,s1+train.zero_stage=2,trl")
    assert [case.name for case in found] == ["s0", "s2+e1+plain", "s1+train.zero_stage=2", "trl"]
    assert found[1].settings == (
        "rollout.max_staleness=2",
        "rollout.update=in_flight",
        "rollout.engines_per_gpu=1",
        "train.compile=false",
    )
    assert [case.ahead for case in found] == [0, 2, 1, 0]
    assert [case.turns for case in cases_named("s0,s0+turns,s0+cluster.colocate=true")] == [False, True, True]
    assert [case.ours for case in found] == [True, True, True, False]
    assert found[1].setting("rollout.engines_per_gpu", 3) == 1
    assert found[0].setting("rollout.engines_per_gpu", 3) == 3


@pytest.mark.parametrize("name", ["s9", "s1+fast", "trl+e1", "s1++e1", "trl-sync"])
def test_a_name_that_means_nothing_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match="a case is one of s0, s1, s2, trl, trl-async"):
        cases_named(name)


def test_settings_of_a_peer_are_its_own() -> None:
    (case,) = cases_named("trl-async+max_staleness=1")
    assert (case.ours, case.settings, case.ahead) == (False, ("max_staleness=1",), 0)


def test_lengths_are_numbers_and_the_tail() -> None:
    assert lengths_named("200, 512,tail") == ["200", "512", "tail"]
    for bad in ("0", "-5", "long", "2.5"):
        with pytest.raises(ValueError, match=f"'{bad}' is none"):
            lengths_named(bad)


def test_steps_beside_which_another_length_is_sampled_do_not_count() -> None:
    assert phases_of(["200", "512"], 0, 2, 4) == [Phase("200", 1, 3, 6, 6), Phase("512", 7, 9, 12, 12)]
    assert phases_of(["200", "512"], 2, 2, 4) == [Phase("200", 1, 4, 7, 9), Phase("512", 10, 13, 16, 18)]


def test_one_run_goes_through_all_fixed_lengths_and_the_tail_has_its_own() -> None:
    assert groups_of(["200", "tail", "512"], apart=False) == [["200", "512"], ["tail"]]
    assert groups_of(["200", "tail", "512"], apart=True) == [["200"], ["512"], ["tail"]]
    assert groups_of(["tail"], apart=False) == [["tail"]]


def test_the_last_setting_counts() -> None:
    assert Case("x", ("rollout.max_staleness=1", "rollout.max_staleness=4")).ahead == 4
