"""The grouped decode path against plain expansion, for ragged maps, masks and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dha_peft.models import decode, set_attention_path, set_decode_kernel
from dha_peft.models.decode import grouped_attention
from dha_peft.models.maps import HeadMaps, neighbour_order, neighbour_pairs


def random_maps(heads: int, keys: int, values: int) -> HeadMaps:
    rows = [list(range(n)) + torch.randint(n, (heads - n,)).tolist() for n in (keys, values)]
    return HeadMaps(*[[row[i] for i in torch.randperm(heads)] for row in rows])


@pytest.fixture
def reset_decode(monkeypatch):
    monkeypatch.setattr(decode, "_kernel", decode._kernel)
    yield
    set_attention_path("auto")


@pytest.mark.parametrize("heads, keys, values", [(8, 3, 5), (7, 7, 1), (6, 1, 6), (12, 4, 4)])
@pytest.mark.parametrize("mask_kind", [None, "bool", "additive"])
def test_grouped_equals_expanded(heads, keys, values, mask_kind):
    torch.manual_seed(heads)
    maps, (batch, queries, length, dim) = random_maps(heads, keys, values), (3, 4, 17, 8)
    query = torch.randn(batch, heads, queries, dim, dtype=torch.float64)
    # A slice of a longer buffer: strides are not those of a contiguous tensor.
    key = torch.randn(batch, keys, length + 5, dim, dtype=torch.float64)[:, :, 5:]
    value = torch.randn(batch, values, length, dim, dtype=torch.float64)
    mask = torch.rand(batch, 1, queries, length) > 0.3 if mask_kind else None
    if mask_kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
    out, probs = grouped_attention(query, key, value, maps, 0.3, mask)
    full_key, full_value = key[:, maps.key_map], value[:, maps.value_map]
    expected = scaled_dot_product_attention(query, full_key, full_value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.matmul(probs, full_value), out)


@pytest.mark.parametrize("heads, keys, values", [(8, 3, 5), (7, 7, 1), (8, 2, 2), (12, 4, 6)])
@pytest.mark.parametrize("mask_kind", ["bool", "additive"])
def test_masks_of_their_own_per_head_on_some_heads_of_a_larger_cache(heads, keys, values, mask_kind):
    torch.manual_seed(heads + values)
    maps, (batch, queries, length, dim) = random_maps(heads, keys, values), (2, 3, 11, 8)
    query = torch.randn(batch, heads, queries, dim, dtype=torch.float64)
    key, value = (torch.randn(batch, n + 2, length, dim, dtype=torch.float64)[:, 1:-1] for n in (keys, values))
    mask = torch.rand(batch, heads, queries, length) > 0.4
    mask[..., 0] = True  # no row is all hidden
    expected = scaled_dot_product_attention(
        query, key[:, maps.key_map], value[:, maps.value_map], attn_mask=mask, scale=0.3
    )
    if mask_kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
    out, probs = grouped_attention(query, key, value, maps, 0.3, mask)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.matmul(probs, value[:, maps.value_map]), out)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("length", [40, 1500])
def test_half_precision_on_both_sides_of_the_float32_limit(dtype, tolerance, length):
    torch.manual_seed(length)
    maps, dim = random_maps(8, 3, 4), 64
    query, key, value = (torch.randn(1, n, t, dim).to(dtype) for n, t in ((8, 1), (3, length), (4, length)))
    assert (key.numel() <= decode.FLOAT32_BELOW) == (length == 40)
    out, _ = grouped_attention(query, key, value, maps, 0.125, weights=False)
    exact, _ = grouped_attention(query.double(), key.double(), value.double(), maps, 0.125, weights=False)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < tolerance * exact.norm()


def test_decode_steps_are_grouped_and_equal_expansion(make_pair, prompts, reset_decode, monkeypatch):
    _, merged = make_pair()
    ids, mask = prompts
    calls = []
    monkeypatch.setattr(decode, "grouped_attention", lambda *a: calls.append(a[0].shape) or grouped_attention(*a))
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    grouped = merged.generate(ids, **options)
    assert set(calls) == {(2, 8, 1, 8)} and len(calls) == 2 * 5  # two layers, every step but the prefill
    set_attention_path("expand")
    expanded = merged.generate(ids, **options)
    assert len(calls) == 2 * 5
    torch.testing.assert_close(grouped.logits, expanded.logits, atol=1e-4, rtol=1e-4)


def test_kernel_is_used_and_may_decline(make_pair, prompts, reset_decode):
    _, merged = make_pair()
    ids, mask = prompts
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = merged.generate(ids, **options)
    seen, steps = [], []

    def kernel(q, k, v, key_map, value_map, scale, mask=None, step=None):
        seen.append((k.shape[1], v.shape[1]))
        steps.append(len(step))
        step.append(mask)
        if len(seen) % 2:
            return None
        return scaled_dot_product_attention(q, k[:, key_map], v[:, value_map], attn_mask=mask, scale=scale)

    set_decode_kernel(kernel)
    assert torch.equal(merged.generate(ids, **options), expected)
    assert set(seen) == {(4, 3), (4, 4)}
    assert steps == [0, 1] * 3  # the two layers of a step share one list, and the next step starts anew
    with pytest.raises(ValueError, match="choose one of auto, grouped, expand"):
        set_attention_path("fast")


def test_eager_returns_attention_weights_while_decoding(make_pair, prompts):
    base, merged = make_pair(attn_implementation="eager")
    ids, mask = prompts
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "output_attentions": True}
    got, expected = (m.generate(ids, return_dict_in_generate=True, **options).attentions for m in (merged, base))
    # Layer 0 keeps the order of its query heads, so the weights agree head by head.
    for step, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(step[0], wanted[0], atol=1e-4, rtol=1e-4)


def test_stock_functions_see_their_own_name_and_equal_head_counts(make_pair, prompts):
    base, merged = make_pair()
    seen = []

    def probe(module, query, key, value, mask, **kwargs):
        seen.append((module.config._attn_implementation, key.shape[1], value.shape[1], module.num_key_value_groups))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    merged.set_attn_implementation("probe")
    torch.testing.assert_close(merged(prompts[0]).logits, base(prompts[0]).logits, atol=1e-4, rtol=1e-4)
    # Layer 0 has 4 key and 3 value heads in no order, so 8 pairs; layer 1 is GQA with 4 heads.
    assert seen == [("probe", 8, 8, 1), ("probe", 4, 4, 2)]


def test_pairs_are_only_used_where_neighbours_share_them():
    assert neighbour_pairs([0, 0, 1, 1], [1, 1, 0, 0]) == [(0, 1), (1, 0)]
    assert neighbour_pairs([0, 1, 0, 1], [0, 1, 0, 1]) == [(0, 0), (1, 1)] * 2
    assert neighbour_pairs([0, 0, 0, 1], [0, 0, 0, 0]) == [(0, 0)] * 3 + [(1, 0)]
    assert neighbour_order([0, 1, 0, 1], [0, 1, 0, 1]) == [0, 2, 1, 3]
    assert neighbour_order([0, 1, 0, 0], [0, 1, 0, 0]) == [0, 1, 2, 3]
