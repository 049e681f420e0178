"""Known answers on trained models: heads that are one head in other frames are found, and fusing them loses nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from shared_data import REPOSITORY, shared_data
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dha_peft import DHAConfig, DHAPlan, convert
from dha_peft.texts import text_tokens, token_batches

DEMO = REPOSITORY / "examples" / "demo_model"
NEIGHBOURS = ((0, 1), (2, 3), (4, 5), (6, 7))


def loaded(folder, text, tokens=4096, length=128):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return base, token_batches(tokenizer, [text], tokens=tokens, length=length), tokenizer


@torch.no_grad()
def assert_same_function(small, base, ids):
    torch.testing.assert_close(small(ids).logits, base(ids).logits, atol=1e-3, rtol=0)


def halved(base, batches, **fields):
    return convert(base, DHAConfig(head_budget=0.5, **fields), batches).eval()


@pytest.mark.parametrize("allocation", ["adaptive", "uniform"])
def test_heads_written_twice_are_found_and_fused_for_nothing(allocation):
    folder, text = shared_data("models/stories260K-mha8"), shared_data("text/tinystories_heldout.jsonl.gz")
    base, batches, tokenizer = loaded(folder, text)
    small = halved(base, batches, allocation=allocation)
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert len(plan.layers) == 5
    assert all(layer.key_groups == layer.value_groups == NEIGHBOURS for layer in plan.layers)
    assert_same_function(small, base, text_tokens(tokenizer, [text], 256)[None])


def test_heads_written_twice_are_found_without_data():
    folder, text = shared_data("models/stories260K-mha8"), shared_data("text/tinystories_heldout.jsonl.gz")
    base, _, tokenizer = loaded(folder, text)
    with pytest.warns(UserWarning, match="calibration_data"):
        small = halved(base, None)
    assert all(x.key_groups == x.value_groups == NEIGHBOURS for x in DHAPlan.from_dict(small.config.dha_plan).layers)
    assert_same_function(small, base, text_tokens(tokenizer, [text], 256)[None])


@torch.no_grad()
def with_planted_pairs(model):
    """The model with four of every layer's eight heads replaced by others of the layer, each under a random change of frame
    that leaves its head's function as it is: a complex factor per rotary pair for keys, an invertible matrix for values.
    Returns the model and, per layer, the pairs of key heads and of value heads, which differ."""
    model, pairs = copy.deepcopy(model), []
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        found = []
        for kind in ("key", "value"):
            order = torch.randperm(8, generator=generator).tolist()
            couples = sorted(tuple(sorted(couple)) for couple in zip(order[:4], order[4:], strict=True))
            for source, target in couples:
                plant(layer.self_attn, kind, source, target, generator)
            found.append(tuple(couples))
        pairs.append(found)
    return model, pairs


def plant(attention, kind, source, target, generator):
    """Make head `target` of one kind a turned copy of head `source`; its queries or outputs stay its own."""
    linear = {"key": attention.k_proj, "value": attention.v_proj}[kind]
    heads = linear.weight.view(8, attention.head_dim, -1)
    if kind == "value":
        turn = torch.linalg.qr(torch.randn(2, attention.head_dim, attention.head_dim, generator=generator))[0]
        stretch = 0.5 + torch.rand(attention.head_dim, generator=generator)
        heads[target] = (turn[0] * stretch) @ turn[1] @ heads[source]
        return
    half = attention.head_dim // 2
    real, imaginary = torch.randn(2, half, 1, generator=generator)
    a, b = heads[source, :half].clone(), heads[source, half:].clone()
    heads[target] = torch.cat([real * a - imaginary * b, real * b + imaginary * a])


def test_planted_pairs_of_the_demo_model_are_found():
    plain, batches, tokenizer = loaded(DEMO, DEMO / "text" / "calibration.jsonl.xz", tokens=8192, length=256)
    base, pairs = with_planted_pairs(plain)
    small = halved(base, batches, allocation="uniform")
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    ids = text_tokens(tokenizer, [DEMO / "text" / "validation.jsonl.xz"], 256)[None]
    assert_same_function(small, base, ids)
    cache = DynamicCache()
    with torch.no_grad():
        small(ids, past_key_values=cache)
    assert all(x.keys.shape == x.values.shape == (1, 4, 256, 32) for x in cache.layers)


def test_plain_pooling_of_planted_pairs_loses_a_lot():
    """The pairs are hidden from the paper's operator: in raw coordinates they have nothing in common."""
    plain, batches, tokenizer = loaded(DEMO, DEMO / "text" / "calibration.jsonl.xz", tokens=2048, length=256)
    base, pairs = with_planted_pairs(plain)
    groups = {"head_dim": 32, "key_groups": [p[0] for p in pairs], "value_groups": [p[1] for p in pairs]}
    small = convert(base, DHAConfig(fusion="linear", plan=groups), batches)
    ids = text_tokens(tokenizer, [DEMO / "text" / "validation.jsonl.xz"], 256)[None]
    with torch.no_grad():
        assert (small(ids).logits - base(ids).logits).abs().max() > 1
