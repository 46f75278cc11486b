import random

import numpy
import torch

from grpo.trainer import rng


def draw() -> tuple[list[float], list[float], list[float]]:
    return [random.gauss(0, 1) for _ in range(3)], numpy.random.randn(3).tolist(), torch.rand(3).tolist()


def test_generators_go_on_where_they_were():
    cpu = torch.device("cpu")
    random.gauss(0, 1), numpy.random.randn(1)  # each keeps half of a pair
    text = rng.capture(cpu)
    expected = draw()
    assert draw() != expected
    rng.restore(text, cpu)
    assert draw() == expected
    seen = {str(expected)}
    for rank in (1, 2):
        rng.derive(text, rank)
        numbers = draw()
        rng.derive(text, rank)
        assert draw() == numbers
        seen.add(str(numbers))
    assert len(seen) == 3
