"""Which rotary pairs count as slow, and that heads which mix them are what the collapse will make of them."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import logits, make_base, make_batches
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from dha_peft import DHAConfig, get_dha_model
from dha_peft.attention import find_attention


@pytest.mark.parametrize(
    ("fields", "slow"),
    [
        ({}, [False, False, True, True]),  # turns of 128, 12.8, 1.28 and 0.128 over 128 tokens
        ({"max_position_embeddings": 4096}, [False] * 4),
        ({"max_position_embeddings": 2048}, [False, False, False, True]),
    ],
)
def test_pairs_are_slow_that_turn_at_most_a_third(fields, slow):
    site = find_attention(make_base(**fields))[0]
    layout = site.layout("key")
    assert site.slow.tolist() == slow and layout.slow == sum(slow)
    assert sorted([*layout.pairs.flatten().tolist(), *layout.rest.tolist()]) == list(range(8))
    assert site.layout("value").slow == 0


def test_scaled_frequencies_count_as_they_are():
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=8, max_position_embeddings=128, rope_parameters=rope)
    assert find_attention(LlamaForCausalLM(config))[0].slow.tolist() == [False, True, True, True]


@pytest.mark.parametrize(("model_type", "pairs"), [("qwen3", 4), ("olmo2", 4), ("gpt2", 0)])
def test_no_pair_is_mixed_under_a_norm_or_without_rotary_positions(model_type, pairs):
    layout = find_attention(make_base(model_type, head_dim=8))[0].layout("key")
    assert layout.slow == 0 and len(layout.pairs) == pairs


@torch.no_grad()
def test_tied_heads_collapse_exactly_at_far_positions():
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.25), make_batches())
    ids = torch.randint(2, 64, (1, 128), generator=torch.Generator().manual_seed(0))
    before = logits(adapted, ids)
    torch.testing.assert_close(before, logits(make_base(), ids))
    adapted.base_model.tie_groups()
    tied = logits(adapted, ids)
    assert not torch.allclose(tied, before, atol=0.1)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), before)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(adapted, ids)
    assert (rounded - tied).norm() < 0.1 * (tied - before).norm()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), tied, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_an_adapter_is_refused_by_a_base_with_other_slow_pairs(tmp_path):
    get_dha_model(make_base(), DHAConfig(head_budget=0.5), make_batches()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_base(), tmp_path)
    with pytest.raises(ValueError, match="mixes 2 slow rotary pairs of a key head, but this base has 0"):
        PeftModel.from_pretrained(make_base(max_position_embeddings=4096), tmp_path)


def test_nearly_tied_heads_collapse_nearly_exactly():
    """Also where an optimizer moved the fusion matrices a little, or multipliers alone drove the groups together."""
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.25), make_batches())
    ids = torch.randint(2, 64, (1, 128), generator=torch.Generator().manual_seed(0))
    adapted.base_model.tie_groups()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("omega"):
                parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    loose = logits(adapted, ids)
    assert 0 < adapted.base_model.fusion_loss() < 1e-6
    merged = logits(adapted.merge_and_unload(), ids)
    assert (merged - loose).norm() < 1e-2 * loose.norm()


def test_a_half_tied_adapter_warns_at_the_collapse():
    adapted = get_dha_model(make_base(), DHAConfig(head_budget=0.25), make_batches())
    for name, module in adapted.named_modules():
        if name.endswith("dha_fusion.default"):
            module.pull(0.5)
    with pytest.warns(UserWarning, match="groups are not tied yet"):
        adapted.merge_and_unload()


def test_layouts_copied_while_evaluating_serve_training():
    layout = find_attention(make_base())[0].layout("key")
    with torch.inference_mode():
        layout.to("meta")
    assert not layout.to("meta").rest.is_inference()
