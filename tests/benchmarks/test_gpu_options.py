import pytest

from benchmarks.gpu.__main__ import parse_options

CPU = ["--device", "cpu", "--shape", "tiny"]


@pytest.mark.parametrize(
    "given, said",
    [
        (["--cases", "s7"], "a case is one of s0, s1, s2, trl, trl-async"),
        (["--cases", ","], "name one at least"),
        (["--tokens", "200,x"], "lengths are numbers of tokens or tail, but 'x' is none"),
        (["--steps", "0"], "must be a whole number of at least 1, not '0'"),
        (["--samples", "1"], "must be a whole number of at least 2, not '1'"),
        (["--cases", "s0", "--gpus", "3"], "give an even number"),
        (["--cases", "s0", "--gpu", "H300"], "--gpu must be one of A100-40, A100"),
        ([], "on a CPU only our cases run"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options([*CPU, *given])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_options_have_values_of_their_own() -> None:
    options = parse_options([*CPU, "--cases", "s1+e2,s0", "--tokens", "tail,200"])
    assert [case.name for case in options.cases] == ["s1+e2", "s0"]
    assert (options.tokens, options.gpus, options.gpu) == (["tail", "200"], 2, "H100")
    assert parse_options([*CPU, "--cases", "s0+turns", "--gpus", "1"]).gpus == 1
