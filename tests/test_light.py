"""The controller and the command line load nothing heavy: they answer at once, and run on a pod without a GPU."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "plotly")


def loaded(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


MODULES = [
    "controller",
    "cli",
    "kubernetes.results",
    "kubernetes.values",
    "data.prompts",
    "plan.memory",
    "observe.metrics",
    "algorithm.advantages",
]


@pytest.mark.parametrize("module", MODULES)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert loaded(f"import grpo.{module}").intersection(HEAVY) == set()


@pytest.mark.parametrize("module", ["cluster", "cluster.preflight", "cluster.drain", "rewards.registry"])
def test_the_driver_needs_nothing_that_only_the_workers_images_have(module: str) -> None:
    assert loaded(f"import grpo.{module}").intersection({"torch", "vllm", "deepspeed"}) == set()


def test_the_probe_sees_what_is_loaded() -> None:
    assert "plotly" in loaded("import plotly")
