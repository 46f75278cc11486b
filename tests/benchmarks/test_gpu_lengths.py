import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.environment import make_environment, own_paths
from benchmarks.gpu.lengths import VARIABLE, Lengths, force, key_of

PROMPTS = ([5, 6, 7], [5, 6, 8])


def rule(tmp_path: Path) -> Path:
    rows = {key_of(PROMPTS[0]): [3, 9], key_of(PROMPTS[1]): [1, 2]}
    phases = [{"batches": 2, "tokens": 20}, {"batches": 1, "rows": rows}, {"batches": 1, "tokens": 7}]
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"samples": 2, "rules": {"64": phases}}))
    return file


def test_batches_go_from_phase_to_phase_and_the_last_one_stays(tmp_path: Path) -> None:
    lengths = Lengths(rule(tmp_path))
    assert [lengths.of(64, PROMPTS[0]) for _ in range(10)] == [20, 20, 20, 20, 3, 9, 7, 7, 7, 7]
    assert [lengths.of(64, PROMPTS[1]) for _ in range(6)] == [20, 20, 20, 20, 1, 2]


def test_other_requests_are_left_alone(tmp_path: Path) -> None:
    assert Lengths(rule(tmp_path)).of(1, PROMPTS[0]) is None


def test_several_processes_count_together(tmp_path: Path) -> None:
    """Engines share the prompts of a batch, and a prompt is not always with the same engine."""
    one, other = Lengths(rule(tmp_path)), Lengths(rule(tmp_path))
    assert [each.of(64, PROMPTS[0]) for each in (one, other) * 3] == [20, 20, 20, 20, 3, 9]


def test_a_forced_request_ends_at_its_length_alone(tmp_path: Path) -> None:
    class Request:
        def __init__(self, prompt_token_ids: list[int], sampling_params: Any) -> None:
            self.prompt_token_ids, self.sampling_params = prompt_token_ids, sampling_params
            self.max_tokens = sampling_params.max_tokens if sampling_params else 1

    force(SimpleNamespace(Request=Request), Lengths(rule(tmp_path)))  # type: ignore[arg-type]

    def params(max_tokens: int) -> SimpleNamespace:
        return SimpleNamespace(max_tokens=max_tokens, ignore_eos=False, stop_token_ids=[1], _eos_token_id=1)

    forced, other, pooled = Request(PROMPTS[0], params(64)), Request(PROMPTS[0], params(8)), Request(PROMPTS[0], None)
    assert (forced.max_tokens, forced.sampling_params) == (
        20,
        SimpleNamespace(max_tokens=64, ignore_eos=True, stop_token_ids=[], _eos_token_id=None),
    )
    assert (other.max_tokens, other.sampling_params) == (8, params(8))
    assert pooled.max_tokens == 1


def test_every_program_of_the_environment_is_forced(tmp_path: Path) -> None:
    """Whatever PYTHONPATH says, and with the packages that this Python has."""
    package = tmp_path / "packages" / "vllm" / "v1"
    package.mkdir(parents=True)
    (package / "request.py").write_text("class Request:\n    def __init__(self): self.max_tokens = 64\n")
    python = make_environment(tmp_path / "python", [str(tmp_path / "packages")])
    code = "import vllm.v1.request as it; print(it.Request.__init__.__qualname__)"

    def said(**variables: str) -> str:
        environment = {"PATH": os.environ["PATH"], **variables}
        done = subprocess.run([python, "-P", "-E", "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    assert said() == "Request.__init__"
    assert said(**{VARIABLE: str(rule(tmp_path))}) == "force.<locals>.begin"


def test_the_environment_has_what_this_python_has_but_its_own_folders(tmp_path: Path) -> None:
    standard = [entry for entry in sys.path if entry.endswith((".zip", "lib-dynload"))]
    found = own_paths([str(tmp_path), str(tmp_path / "gone"), *standard, str(tmp_path)])
    assert found[1:] == [str(tmp_path)]
    assert Path(found[0], "grpo").is_dir()


@pytest.mark.parametrize("one, other", [([1, 2], [12]), ([1, 23], [12, 3])])
def test_prompts_have_names_of_their_own(one: list[int], other: list[int]) -> None:
    assert key_of(one) != key_of(other)
