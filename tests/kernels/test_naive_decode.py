"""The reference against an independent formulation in float64, and the facade where Triton cannot be used."""

from __future__ import annotations

import pytest
import torch

from dha_peft.kernels import decode_kernel, dha_decode, naive_decode, unsupported


def inputs(batch=2, heads=6, key_heads=2, value_heads=3, tokens=1, keys=17, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    shapes = [(batch, heads, tokens, dim), (batch, key_heads, keys, dim), (batch, value_heads, keys, dim)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    maps = [torch.randint(n, (heads,), generator=generator) for n in (key_heads, value_heads)]
    return q, k, v, *maps


def by_einsum(q, k, v, key_map, value_map, seen):
    """One-hot maps instead of gathers, one sum over everything; `seen [B, Tq, S]`."""
    key_of = torch.nn.functional.one_hot(key_map, k.shape[1]).double()
    value_of = torch.nn.functional.one_hot(value_map, v.shape[1]).double()
    scores = torch.einsum("bhtd,hg,bgsd->bhts", q, key_of, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,hg,bgsd->bhtd", weights, value_of, v)


@pytest.mark.parametrize("tokens", [1, 3])
def test_causal_by_default(tokens):
    args = inputs(tokens=tokens)
    seen = torch.ones(tokens, 17, dtype=torch.bool).tril(17 - tokens).expand(2, -1, -1)
    torch.testing.assert_close(naive_decode(*args), by_einsum(*args, seen), rtol=1e-12, atol=1e-12)


def test_start_and_length_hide_what_lies_outside_even_nan():
    q, k, v, *maps = inputs(tokens=2)
    start, length = torch.tensor([0, 5]), torch.tensor([11, 17])
    index = torch.arange(17)
    last = length[:, None] - torch.tensor([1, 0])
    seen = (index >= start[:, None, None]) & (index < last[..., None])
    want = by_einsum(q, k, v, *maps, seen)
    k[0, :, 11:], v[0, :, 11:], v[1, :, :5] = torch.nan, torch.nan, torch.nan
    torch.testing.assert_close(naive_decode(q, k, v, *maps, start=start, length=length), want, rtol=1e-12, atol=1e-12)


def test_bool_and_additive_masks_agree():
    args = inputs(tokens=2)
    seen = torch.rand(2, 1, 2, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., 0] = True
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    want = by_einsum(*args, seen[:, 0])
    torch.testing.assert_close(naive_decode(*args, mask=seen), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(naive_decode(*args, mask=additive), want, rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zeros():
    args = inputs()
    out = naive_decode(*args, length=torch.tensor([0, 17]))
    assert not out[0].any() and out[1].any()


def test_facade_falls_back_to_torch_off_cuda():
    args = inputs(dtype=torch.float32)
    assert "CUDA" in unsupported(*args[:3]) or "Triton" in unsupported(*args[:3])
    torch.testing.assert_close(dha_decode(*args), naive_decode(*args))
    assert decode_kernel(*args, scale=1.0) is None


def test_facade_names_what_is_wrong():
    args = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="backend"):
        dha_decode(*args, backend="cuda")
    with pytest.raises(ValueError, match="Triton kernel does not take"):
        dha_decode(*args, backend="triton")


def test_fake_operator_has_the_layout_of_the_real_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = torch.ops.dha_peft.decode(
            torch.empty(2, 6, 3, 8),
            torch.empty(2, 2, 9, 8),
            torch.empty(2, 3, 9, 8),
            torch.zeros(6),
            torch.zeros(6),
            1.0,
        )
    assert out.shape == (2, 6, 3, 8) and out.transpose(1, 2).is_contiguous()
