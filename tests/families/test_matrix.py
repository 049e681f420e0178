"""Every family through the whole road: adapter, tied groups, collapse, generation, cache. `test_reload.py` goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from dha_peft import DHAConfig, get_dha_model
from dha_peft.adapter.fusion_state import HeadFusion
from dha_peft.attention import find_attention
from dha_peft.models import FAMILIES

from .cases import CASES, DISTINCT, HEADS, Case, make_base, make_batches, prompts
from .test_encoder_decoders import AUTOS as SEQ2SEQ
from .test_encoders import ENCODERS

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
RUNS = [pytest.param(case, attn, id=f"{case}-{attn}") for case in CASES for attn in case.attn]


def test_every_family_has_a_row():
    assert {case.family for case in CASES}.isdisjoint(ENCODERS.keys() | SEQ2SEQ.keys())
    assert {case.family for case in CASES} | ENCODERS.keys() | SEQ2SEQ.keys() == set(FAMILIES)


def test_families_with_grouped_queries_have_a_row_with_them():
    for family in {case.family for case in CASES}:
        kinds = {find_attention(make_base(case))[0].num_heads for case in CASES if case.family == family}
        grouped = (
            family == "falcon" or "num_key_value_heads" in FAMILIES[family].base_class("Config").__dataclass_fields__
        )
        wanted = {HEADS // 2} if grouped and family != "persimmon" else {HEADS}
        assert wanted <= kinds <= {HEADS, HEADS // 2}, family


@torch.no_grad()
@pytest.mark.parametrize("case, attn", RUNS)
def test_family(case: Case, attn: str):
    base, inputs = make_base(case, attn), prompts()
    wanted, tokens = base(**inputs).logits, base.generate(**inputs, **GREEDY)
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), make_batches())
    torch.testing.assert_close(adapted(**inputs).logits, wanted, **CLOSE)
    assert torch.equal(adapted.generate(**inputs, **GREEDY), tokens)

    adapted.base_model.tie_groups()
    tied, tokens = adapted(**inputs).logits, adapted.generate(**inputs, **GREEDY)
    assert (tied - wanted).abs().max() > 1e-2  # random heads differ: the collapse is no empty step
    plan = adapted.base_model.plan()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, tied, **CLOSE)
    assert torch.equal(merged.generate(**inputs, **GREEDY), tokens)
    assert plan.heads_after == round(plan.heads_before / 2)
    assert merged.config._attn_implementation == attn

    cache = DynamicCache(config=merged.config)
    merged(inputs["input_ids"], past_key_values=cache)
    counts = [(layer.keys.shape[1], layer.values.shape[1]) for layer in cache.layers]
    assert counts == [(layer.num_key_heads, layer.num_value_heads) for layer in plan.layers]
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in make_base(case, attn).parameters())


@torch.no_grad()
@pytest.mark.parametrize("case", DISTINCT, ids=str)
def test_half_fused_weights_merge_in_place_and_back(case: Case):
    base, inputs = make_base(case), prompts()
    wanted = base(**inputs).logits
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), make_batches())
    started = [fusion.omega.clone() for fusion in fusions(adapted)]
    adapted.base_model.tie_groups()
    for fusion, start in zip(fusions(adapted), started, strict=True):
        fusion.omega.lerp_(start, 0.5)
    half = copy.deepcopy(adapted)(**inputs).logits
    assert (half - wanted).abs().max() > 1e-2
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(**inputs).logits, half, **CLOSE)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**inputs).logits, wanted, **CLOSE)
    torch.testing.assert_close(adapted(**inputs).logits, half, **CLOSE)


def fusions(model: nn.Module) -> list[HeadFusion]:
    return [module for module in model.modules() if isinstance(module, HeadFusion)]


@pytest.mark.parametrize("case", DISTINCT, ids=str)
def test_every_trainable_parameter_gets_a_gradient(case: Case):
    adapted = get_dha_model(make_base(case), DHAConfig(head_budget=0.5), make_batches(1))
    batch = make_batches(1)[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and not [name for name, parameter in trained.items() if parameter.grad is None]


@torch.no_grad()
@pytest.mark.parametrize("case", DISTINCT, ids=str)
def test_unload_gives_the_base_back(case: Case):
    base = make_base(case)
    before, wanted = {name: tensor.clone() for name, tensor in base.state_dict().items()}, base(**prompts()).logits
    plain = get_dha_model(base, DHAConfig(head_budget=0.5, init_weights=False), make_batches(1)).unload()
    assert plain is base and plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(plain(**prompts()).logits, wanted)
    assert not any(module._forward_hooks for module in plain.modules())
