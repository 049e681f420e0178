"""peft's own doors: make, save, load, add, and train other modules beside."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapter.tiny import HEADS, LAYERS, logits, make_base, make_batches, same_state, state
from dha_peft import DHAConfig, DHAModel, convert, get_dha_model

from .test_states import adapted, noisy


@pytest.fixture(params=["aligned", "linear"])
def saved(request, tmp_path):
    """A trained adapter and its base on disk: (base folder, adapter folder, adapted model)."""
    make_base("qwen2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = noisy(get_dha_model(base, DHAConfig(head_budget=0.5, fusion=request.param), make_batches()))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


def test_get_peft_model_compares_weights_and_says_so():
    with pytest.warns(UserWarning, match="no `calibration_data`: heads are compared by their weights alone"):
        model = get_peft_model(make_base(), DHAConfig(head_budget=0.25))
    assert isinstance(model, PeftModel) and isinstance(model.base_model, DHAModel)
    assert model.base_model.plan().heads_after == 12 and torch.equal(logits(model), logits(make_base()))
    with pytest.warns(UserWarning, match="weights alone"):
        ours = get_dha_model(make_base(), DHAConfig(head_budget=0.25))
    for made in (model, ours):
        made.base_model.tie_groups()
    assert torch.equal(logits(model), logits(ours))
    with pytest.warns(UserWarning, match="weights alone"):
        small = convert(make_base(), DHAConfig(head_budget=0.25))
    torch.testing.assert_close(logits(small), logits(ours), atol=1e-3, rtol=1e-3)


def test_the_users_config_is_not_changed():
    config = DHAConfig(head_budget=0.5)
    get_dha_model(make_base(), config, make_batches())
    assert config.plan is None and config.target_modules is None


@pytest.mark.parametrize("low", [False, True])
def test_save_and_load(saved, low, recwarn):
    folder, adapter, model = saved
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model)) and same_state(loaded, state(model))
    assert loaded.base_model.plan() == model.base_model.plan()
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert not [w for w in recwarn if "weights alone" in str(w.message) or "missing" in str(w.message).lower()]
    for made in (loaded, model):
        made.base_model.tie_groups()
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model.merge_and_unload()))


def test_auto_door_and_config(saved):
    _, adapter, model = saved
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, DHAConfig) and config.plan == model.base_model.plan().to_dict() and config.inference_mode
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits(loaded), logits(model)) and not any(p.requires_grad for p in loaded.parameters())


def test_load_adapter_beside_another(saved):
    folder, adapter, model = saved
    base = AutoModelForCausalLM.from_pretrained(folder)
    other = get_dha_model(base, DHAConfig(head_budget=0.25, fusion="linear"), make_batches())
    other.load_adapter(adapter, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="only one DHA adapter|different peft types"):
        other.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
        other.base_model.set_adapter(["default", "second"])


def test_transformers_own_doors(saved):
    folder, adapter, model = saved
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match="weights alone"):
        plain.add_adapter(DHAConfig(head_budget=0.5), adapter_name="dha")
    assert torch.equal(logits(plain), logits(make_base("qwen2")))
    assert all("dha_fusion" in n for n, p in plain.named_parameters() if p.requires_grad and "dha" in n)
    noisy_logits = logits(noisy_dha(plain))
    assert not torch.allclose(noisy_logits, logits(make_base("qwen2")))
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(make_base("qwen2")))
    plain.enable_adapters()
    assert torch.equal(logits(plain), noisy_logits)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.load_adapter(str(adapter))
    assert torch.equal(logits(loaded), logits(model))


def noisy_dha(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dha_fusion" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_modules_to_save(tmp_path):
    base = make_base("llama", tie_word_embeddings=False)
    model = get_dha_model(base, DHAConfig(head_budget=0.5, modules_to_save=["lm_head"]), make_batches())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trainable if "dha_fusion" not in n} == {"weight"}
    noisy(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("llama", tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model.base_model.tie_groups()
    expected, head = logits(model), model.base_model.model.lm_head.modules_to_save["default"].weight.clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, head) and not torch.equal(head, make_base().lm_head.weight)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("low", [False, True])
def test_an_adapter_for_another_base_shape(tmp_path, low):
    adapted("llama", 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"layers of 4 heads .* this model has {LAYERS} layers of {HEADS} heads"):
        PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=low)
    with pytest.raises(ValueError, match="3 layers .* this model has 2 layers"):
        PeftModel.from_pretrained(make_base(num_hidden_layers=2, num_key_value_heads=4), tmp_path)


def test_the_merged_model_takes_a_lora():
    small = convert(make_base(), DHAConfig(head_budget=0.5), make_batches())
    model = get_peft_model(small, LoraConfig(r=2))
    assert torch.equal(logits(model), logits(small)) and sum(p.requires_grad for p in model.parameters()) == 4 * LAYERS
