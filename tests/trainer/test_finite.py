import pytest
import torch

from grpo.trainer.finite import is_finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite(value, dtype):
    tensor = torch.full((3, 5), 1e38, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    for place in (0, 7, 14):
        spoiled = tensor.clone()
        spoiled.view(-1)[place] = value
        assert not is_finite(spoiled)
