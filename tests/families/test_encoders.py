"""Encoders go the same road; they have no cache, so fused heads save weights and projections only."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model
from dha_peft.attention import find_attention

from .cases import HEAD_DIM, HEADS, LAYERS, VOCAB, make_batches, prompts
from .test_planted import plant

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def make_encoder(auto: type = AutoModelForMaskedLM, attn: str = "eager") -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", initializer_range=0.3, num_labels=3, **sizes)
    return auto.from_config(config, attn_implementation=attn).eval()


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_encoder(auto: type, attn: str, tmp_path):
    base, inputs = make_encoder(auto, attn), prompts()
    size, wanted = sum(p.numel() for p in base.parameters()), base(**inputs).logits
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), make_batches())
    torch.testing.assert_close(adapted(**inputs).logits, wanted, **CLOSE)
    adapted.base_model.tie_groups()
    tied = adapted(**inputs).logits
    plan = adapted.base_model.plan()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, tied, **CLOSE)
    gone = (plan.heads_before - plan.heads_after) * HEAD_DIM * (HEADS * HEAD_DIM + 1)
    assert size - sum(p.numel() for p in merged.parameters()) == gone
    merged.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, attn_implementation=attn)
    assert type(loaded) is type(merged)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_planted_pairs_of_an_encoder_are_found_and_fused_for_nothing():
    base = make_encoder()
    pairs = [[plant(site, kind) for kind in ("key", "value")] for site in find_attention(base)]
    small = convert(base, DHAConfig(head_budget=0.5, allocation="uniform"), make_batches(4, 32))
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    torch.testing.assert_close(small(**prompts()).logits, base(**prompts()).logits, atol=1e-3, rtol=0)
