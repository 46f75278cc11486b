"""What a model may ask of attention, and what happens to what is not known."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from grpo.errors import ConfigError
from grpo.trainer import kernels
from grpo.trainer.attention import Layout, attending, packed_attention
from grpo.trainer.kernels import blockwise_attention, dense_attention
from grpo.trainer.masks import RowMask, row_mask
from grpo.trainer.packing import pack
from tests.models import random_samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [1, 5, 6, 7, 700])
@pytest.mark.parametrize("window", [1, 5, 6, 10_000])
def test_a_window_is_known_by_what_the_model_says_of_places(window, length):
    mask = row_mask(sliding_window_causal_mask_function(window), length, CPU)
    assert mask == RowMask(window if window < length else None)
    assert mask.plain(length) == (window >= length)


def test_another_pattern_is_kept_as_it_is():
    chunks = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    assert row_mask(chunks, 4, CPU) == RowMask()
    seen_LL = row_mask(chunks, 10, CPU).seen_LL
    places = torch.arange(10)
    expected_LL = (places <= places[:, None]) & (places // 4 == places[:, None] // 4)
    assert torch.equal(seen_LL, expected_LL)
    even = and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0)
    assert row_mask(even, 6, CPU).seen_LL.sum() == 12


@pytest.mark.parametrize("length", [2, 9, 600])
@pytest.mark.parametrize(
    "seen",
    [bidirectional_mask_function, or_masks(causal_mask_function, lambda b, h, q, k: k < 3 + 0 * q)],
    ids=["both ways", "prefix"],
)
def test_a_token_that_would_see_what_follows_is_an_error(seen, length):
    with pytest.raises(ConfigError, match="attention must be causal"):
        row_mask(seen, length, CPU)


def asked(module=None, mask=None, **arguments):
    """What attention answers on a batch of three rows."""
    batch = pack(random_samples(3))
    tokens = len(batch.input_ids_T)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2)]
    with attending(Layout(batch, flash=False)):
        return packed_attention(module or torch.nn.Linear(1, 1), *states, mask, **arguments)[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "Linear hands over position_bias"),
        ({"alibi": torch.zeros(1), "indices": [1]}, "alibi, indices"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"chunk_size": 4}, "chunk_size"),
    ],
    ids=str,
)
def test_an_argument_that_is_not_known_is_an_error_that_names_it(arguments, named):
    with pytest.raises(ConfigError, match=named):
        asked(**arguments)


def test_arguments_that_say_nothing_are_taken():
    plain = asked()
    assert torch.equal(plain, asked(dropout=0.0, position_bias=None, use_cache=False, position_ids=torch.zeros(1)))
    assert torch.equal(plain, asked(mask=RowMask(), is_causal=True, sliding_window=4096))


@pytest.mark.parametrize(
    ("module", "mask", "arguments", "said"),
    [
        (SimpleNamespace(is_causal=False), None, {}, "must be causal, but that of SimpleNamespace"),
        (None, None, {"is_causal": False}, "must be causal"),
        (None, torch.zeros(1, 1, 3, 3), {}, "a mask itself|brings one of its own"),
        (None, RowMask(), {"sliding_window": 2}, "a window of 2 tokens and a mask of another kind"),
        (None, RowMask(3), {"sliding_window": 2}, "a mask of 3"),
    ],
    ids=str,
)
def test_attention_that_is_not_causal_or_contradicts_itself_is_an_error(module, mask, arguments, said):
    with pytest.raises(ConfigError, match=said):
        asked(module, mask, **arguments)


@pytest.mark.parametrize(
    "mask", [RowMask(), RowMask(3), RowMask(seen_LL=(torch.arange(7)[:, None] // 4 == torch.arange(7) // 4).tril())]
)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_of_queries_give_what_whole_rows_give(mask, softcap, sinks, monkeypatch):
    """Values and gradients, in float64, against the formula; also with heads of unequal size."""
    torch.manual_seed(0)
    sizes = [(2, 4, 7, 6), (2, 2, 7, 6), (2, 2, 7, 3), (4,)]
    query, key, value, sinks_H = inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(7)
    seen_LL = mask.seen_LL
    if seen_LL is None:
        seen_LL = (places <= places[:, None]) & (places > places[:, None] - (mask.window or 7))
    weights = scores.exp() * seen_LL
    total = weights.sum(-1, keepdim=True) + (sinks_H.exp().view(1, 4, 1, 1) if sinks else 0)
    expected = (weights / total) @ value.repeat_interleave(2, 1)
    wanted = inputs if sinks else inputs[:3]
    slopes = torch.autograd.grad(expected.sin().sum(), wanted)
    for limit in (1, 3 * 56, 1 << 20):  # one query at a time, three, all
        monkeypatch.setattr(kernels, "BLOCK_SCORES", limit)
        found = blockwise_attention(query, key, value, 0.3, mask, softcap, sinks_H if sinks else None)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # the softmax is in float32
        torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), wanted), slopes, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dense_attention_is_causal_attention_with_its_gradients(kv_heads):
    torch.manual_seed(0)
    shapes = [(3, heads, 7, 8) for heads in (4, kv_heads, kv_heads)]
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    reference = [tensor.detach().clone().requires_grad_() for tensor in ours]
    found = dense_attention(*ours, scaling=None)
    expected = F.scaled_dot_product_attention(*reference, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for output in (found, expected):
        (output * weights).sum().backward()
    for left, right in zip(ours, reference, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_a_scale_of_the_models_own_is_used():
    query = torch.eye(2, dtype=torch.float64)[None, None]
    attended = dense_attention(query, query, query, scaling=3.0)
    share = torch.tensor(3.0, dtype=torch.float64).exp()
    torch.testing.assert_close(attended[0, 0, 1], torch.stack([1 / (1 + share), share / (1 + share)]))
