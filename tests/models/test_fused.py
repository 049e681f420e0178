"""Fused projections: the same function, the same state dict, undone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch

from dha_peft.models.fused import FusedLinear
from dha_peft.models.modeling_dha import MODELS

SAVED = 2 * (2 + 1)  # two layers: k and v with q, up with gate


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_the_model_stays_the_same(make_pair, prompts, family, tmp_path):
    _, merged = make_pair(family)
    ids, mask = prompts
    expected, state = merged(ids, attention_mask=mask).logits, copy.deepcopy(merged.state_dict())
    tokens = merged.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert merged.fuse_projections() == SAVED and merged.fuse_projections() == 0
    torch.testing.assert_close(merged(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), tokens)
    assert not any(module.kept for module in merged.modules() if isinstance(module, FusedLinear))
    assert {name: x.shape for name, x in merged.state_dict().items()} == {name: x.shape for name, x in state.items()}
    merged.save_pretrained(tmp_path)
    again = MODELS[merged.config.model_type]["AutoModelForCausalLM"].from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in state.items())
    merged.load_state_dict({name: 2 * x for name, x in state.items()})
    merged.unfuse_projections()
    assert all(torch.equal(merged.state_dict()[name], 2 * x) for name, x in state.items())
    assert not any(isinstance(module, FusedLinear) for module in merged.modules())


def test_compiled_whole(make_pair, prompts):
    _, merged = make_pair()
    merged.fuse_projections()
    with torch.no_grad():
        expected = merged(prompts[0]).logits
        compiled = torch.compile(lambda ids: merged(ids).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(prompts[0]), expected, atol=1e-5, rtol=1e-5)


def test_a_part_asked_about_another_input_computes_its_own(make_pair):
    _, merged = make_pair()
    attention, (x, y) = merged.model.layers[0].self_attn, torch.randn(2, 3, merged.config.hidden_size)
    expected = attention.k_proj(y)
    merged.fuse_projections()
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(y), expected)


def test_adapters_keep_their_projections_apart(make_pair):
    _, merged = make_pair()
    LoraConfig = pytest.importorskip("peft").LoraConfig
    merged.add_adapter(LoraConfig(target_modules=["v_proj", "up_proj"]))
    assert merged.fuse_projections() == 0
