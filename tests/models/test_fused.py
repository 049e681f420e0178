"""Fused projections: the same function, the same state dict, undone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch

from dha_peft import DHAConfig, convert
from dha_peft.models.fused import FusedLinear
from dha_peft.models.modeling_dha import MODELS

from .conftest import HEAD_DIM, HEADS, make_base

STACKS = {
    "bart": {
        "d_model": HEADS * HEAD_DIM, "init_std": 0.3, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    },
    "t5": {
        "d_model": HEADS * HEAD_DIM, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS, "d_kv": HEAD_DIM,
        "d_ff": 48,
    },
}  # fmt: skip
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


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "saved"),
    [("bart", 4 * 2), ("t5", 4 * 2), ("bert", 0)],  # two layers each; cross-attention is left alone
    ids=str,
)
def test_several_stacks(prompts, family, saved):
    auto = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForSeq2SeqLM"
    ids = {"input_ids": prompts[0]} | ({} if family == "bert" else {"decoder_input_ids": prompts[0][:, :4]})
    small = convert(make_base(family, auto, **STACKS.get(family, {})), DHAConfig(head_budget=0.5), [ids])
    expected, state = small(**ids).logits, copy.deepcopy(small.state_dict())
    assert small.fuse_projections() == saved
    torch.testing.assert_close(small(**ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(small.state_dict()[name], x) for name, x in state.items())
    assert not any(module.kept for module in small.modules() if isinstance(module, FusedLinear))


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
