"""What the adapter computes: the base at first, the merged model at last, and both through merge and unmerge."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import DynamicCache

from adapter.tiny import HEAD_DIM, HEADS, LAYERS, VOCAB, logits, make_base, make_batches, make_ids, same_state, state
from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model
from dha_peft.adapter import DHALayer

BASES = [("llama", HEADS), ("llama", 4), ("mistral", 4), ("qwen2", HEADS), ("qwen2", 2)]
HEAL = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model_type="llama", kv_heads=HEADS, **fields):
    base = make_base(model_type, num_key_value_heads=kv_heads)
    return get_dha_model(base, DHAConfig(**{"head_budget": 0.5, **fields}), make_batches())


def noisy(model, seed=0):
    """Move every trainable parameter, so that nothing is at its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("model_type", "kv_heads"), BASES)
@pytest.mark.parametrize("fusion", ["aligned", "linear"])
def test_a_new_adapter_is_the_base_exactly(model_type, kv_heads, fusion):
    expected = logits(make_base(model_type, num_key_value_heads=kv_heads))
    model = adapted(model_type, kv_heads, fusion=fusion)
    assert torch.equal(logits(model), expected)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("dha_fusion" in name for name in trainable)
    assert {n.rsplit(".", 1)[1] for n in trainable} == {"omega"} | (
        {"into_pair", "out_pair", "into_full", "out_full"} if fusion == "aligned" else set()
    )
    assert model.base_model.plan().heads_after == round(0.5 * 2 * kv_heads * LAYERS)


def test_frames_can_stay_fixed():
    names = [n for n, p in adapted(train_frames=False).named_parameters() if p.requires_grad]
    assert names and all(n.endswith("omega") for n in names)


@pytest.mark.parametrize(("model_type", "kv_heads"), BASES)
@pytest.mark.parametrize("fusion", ["aligned", "linear"])
def test_the_collapse_of_tied_groups_changes_nothing_but_the_cache(model_type, kv_heads, fusion):
    model = noisy(adapted(model_type, kv_heads, fusion=fusion))
    model.base_model.tie_groups()
    plan, expected = model.base_model.plan(), logits(model)
    assert model.base_model.fusion_loss() < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not any("dha_" in name or "base_layer" in name for name in merged.state_dict())
    cache = DynamicCache(config=merged.config)
    merged(make_ids(9), past_key_values=cache)
    for layer, held, attention in zip(plan.layers, cache.layers, merged.model.layers, strict=True):
        assert held.keys.shape == (2, layer.num_key_heads, 9, HEAD_DIM)
        assert held.values.shape == (2, layer.num_value_heads, 9, HEAD_DIM)
        assert attention.self_attn.k_proj.weight.shape[0] == layer.num_key_heads * HEAD_DIM
    assert DHAPlan.from_dict(merged.config.dha_plan) == plan


def test_tying_at_once_is_the_one_shot_conversion():
    for fusion in ("aligned", "linear"):
        model = adapted(fusion=fusion)
        model.base_model.tie_groups()
        small = convert(make_base(), DHAConfig(head_budget=0.5, fusion=fusion), make_batches())
        torch.testing.assert_close(logits(model), logits(small), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fusion", ["aligned", "linear"])
@pytest.mark.parametrize("grouping", ["contiguous", "learned"])
def test_a_random_state_can_be_collapsed(fusion, grouping):
    model = adapted("qwen2", fusion=fusion, grouping=grouping, init_weights=False)
    expected = logits(model)
    assert not torch.allclose(expected, logits(make_base("qwen2")), atol=1e-2)
    assert model.base_model.fusion_loss() < 1e-10
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_an_untied_collapse_warns_with_the_loss():
    model = adapted()
    loss = model.base_model.fusion_loss()
    assert loss > 1e-2
    with pytest.warns(UserWarning, match=f"not tied yet: the fusion loss is {loss:.2e}"):
        model.merge_and_unload()


@pytest.mark.parametrize(("model_type", "fusion"), [("qwen2", "aligned"), ("llama", "linear")])
def test_merge_adapter_can_be_undone_exactly(model_type, fusion):
    model = noisy(adapted(model_type, fusion=fusion))
    before, expected, loss = state(model), logits(model), model.base_model.fusion_loss()
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), expected) and not same_state(model, before)
    assert model.base_model.fusion_loss() == loss
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(make_base(model_type)))
    model.unmerge_adapter()
    assert same_state(model, before) and torch.equal(logits(model), expected)
    assert torch.equal(logits(make_base(model_type)), logits(model.unload()))


def test_merging_the_weights_first_gives_the_same_collapse():
    first, second = (noisy(adapted("qwen2")) for _ in range(2))
    for model in (first, second):
        model.base_model.tie_groups()
    second.merge_adapter()
    assert torch.equal(logits(first.merge_and_unload()), logits(second.merge_and_unload()))


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_back_the_untouched_base(merged):
    base = make_base("qwen2")
    before = state(base)
    model = noisy(get_dha_model(base, DHAConfig(head_budget=0.5), make_batches()))
    if merged:
        model.merge_adapter()
    plain = model.unload()
    assert plain is base and same_state(plain, before)
    assert not any(isinstance(m, DHALayer) for m in plain.modules())


def test_safe_merge_refuses_a_broken_adapter():
    model = adapted()
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    for merge in (lambda: model.merge_adapter(safe_merge=True), lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge()


def test_disable_and_enable():
    model = noisy(adapted())
    base, ours = logits(make_base()), logits(model)
    assert not torch.allclose(base, ours)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), ours)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), ours)


def test_several_adapters():
    model = adapted(head_budget=0.5, fusion="linear")
    model.add_adapter("small", DHAConfig(head_budget=0.25, plan=small_plan()))
    noisy(model)
    ours = logits(model)
    model.set_adapter("small")
    assert torch.equal(logits(model), logits(make_base()))
    assert all(".small." in n for n, p in model.named_parameters() if p.requires_grad)
    noisy(model, seed=1)
    theirs = logits(model)
    assert not torch.allclose(ours, theirs)
    model.set_adapter("default")
    assert torch.equal(logits(model), ours)
    with pytest.raises(ValueError, match="only one DHA adapter can be active"):
        model.base_model.set_adapter(["default", "small"])
    with pytest.raises(ValueError, match="only one DHA adapter can be merged"):
        model.merge_and_unload(adapter_names=["default", "small"])
    model.set_adapter("small")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["small"] and not any(".default." in n for n in model.state_dict())
    assert torch.equal(logits(model), theirs)
    model.base_model.tie_groups("small")
    tied = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tied, atol=1e-4, rtol=1e-4)
    assert DHAPlan.from_dict(merged.config.dha_plan).heads_after == 12


def small_plan():
    return convert(make_base(), DHAConfig(head_budget=0.25), make_batches()).config.dha_plan


def test_the_adapter_that_is_named_is_merged_and_warned_about():
    model = adapted()
    model.add_adapter("small", DHAConfig(head_budget=0.25, plan=small_plan()))
    model.base_model.tie_groups("small")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload(adapter_names=["small"])
    assert DHAPlan.from_dict(merged.config.dha_plan).heads_after == 12


def heal(model):
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=HEAL, init_lora_weights=False), model, "heal")


def test_a_lora_beside_it_trains_and_is_merged_together():
    model = noisy(adapted("qwen2"))
    model.base_model.tie_groups()
    before = logits(model)
    heal(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with torch.no_grad():  # merged weights go through float32 once more
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
    loss = model(make_ids(), labels=make_ids()).loss
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"lora_A", "lora_B"} <= {part for n in moved for part in n.split(".")}
    assert sum("lora_A" in n for n in moved) == len(HEAL) * LAYERS
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any("lora" in n or "base_layer" in n for n in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)


def test_lora_on_the_same_projections_is_refused_in_both_orders():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    with_lora = get_peft_model(make_base(), lora)
    for door in (get_dha_model, convert):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.[qv]_proj` already carries a LoRA"):
            door(with_lora.base_model.model, DHAConfig(), make_batches())
    model = adapted()
    with pytest.raises(ValueError, match=r"v_proj` carries a DHA adapter, and LoRA would wrap it"):
        inject_adapter_in_model(lora, model, "heal")


def test_target_modules_must_be_key_or_value_projections():
    with pytest.raises(ValueError, match="`target_modules`"):
        get_dha_model(make_base(), DHAConfig(target_modules=["q_proj", "k_proj", "v_proj"]), make_batches())
    with pytest.raises(ValueError, match="`target_modules`"):
        get_dha_model(make_base(), DHAConfig(target_modules=["k_proj"]), make_batches())
    assert adapted(target_modules=["v_proj", "k_proj"]).base_model.plan().heads_after == 24


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_tasks(auto):
    base = make_base("llama", auto)
    model = get_dha_model(base, DHAConfig(head_budget=0.25), make_batches())
    model.base_model.tie_groups()
    merged = model.merge_and_unload()
    assert (
        merged.config.model_type == "dha_llama"
        and type(merged).__name__ == "Dha" + type(make_base("llama", auto)).__name__
    )
    assert merged.config.vocab_size == VOCAB and all(t.isfinite().all() for t in merged(make_ids())[:1])


def test_half_precision_keeps_the_state_in_float32():
    expected = logits(make_base().bfloat16())
    model = get_dha_model(make_base().bfloat16(), DHAConfig(head_budget=0.5), make_batches())
    assert torch.equal(logits(model), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.base_model.tie_groups()
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {torch.bfloat16}
