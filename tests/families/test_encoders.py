"""Encoders go the same road; they have no cache, so fused heads save weights and projections only."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model
from dha_peft.attention import find_attention
from dha_peft.models import FAMILIES

from .cases import HEAD_DIM, HEADS, LAYERS, VOCAB, make_batches, prompts
from .test_planted import plant

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ENCODERS: dict[str, tuple[str, ...]] = {
    "bert": ("AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
    "roberta": ("AutoModelForMaskedLM",),
    "xlm-roberta": ("AutoModelForSequenceClassification",),
    "electra": ("AutoModelForTokenClassification",),
    "distilbert": ("AutoModelForMaskedLM", "AutoModelForQuestionAnswering"),
    "vit": ("AutoModelForImageClassification", "AutoModel"),
}
"""Family -> Auto classes that are tried."""
RUNS = [(family, auto, attn) for family, autos in ENCODERS.items() for auto in autos for attn in ("eager", "sdpa")]
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
OWN = {"distilbert": {"dim": HEADS * HEAD_DIM, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48, "num_labels": 2}}
OWN["vit"] = {"image_size": 16, "patch_size": 4, "qkv_bias": True}


def make_encoder(family: str, auto: str = "", attn: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {})})
    model = getattr(transformers, auto or ENCODERS[family][0]).from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "position_embeddings", "cls_token")) and "norm" not in name.lower():
            parameter.data.normal_(std=0.3)
    return model


def make_inputs(family: str) -> dict[str, Tensor]:
    """Two padded prompts, or two images."""
    if family != "vit":
        return prompts()
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def calibration(family: str, count: int = 2, length: int = 16) -> list[dict[str, Tensor]]:
    return make_batches(count, length) if family != "vit" else [{"pixel_values": torch.randn(8 * count, 3, 16, 16)}]


def first_output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states of a bare trunk."""
    return model(**inputs).to_tuple()[0]


def test_every_encoder_is_tried_and_is_no_causal_model():
    alone = {
        name
        for name, row in FAMILIES.items()
        if {r for part in row.parts() for r in part.attention.values()} == {"encoder"}
    }
    assert alone == ENCODERS.keys()
    with pytest.raises(
        ValueError, match="`RobertaForCausalLM` has no merged counterpart; pass one of .*RobertaForMaskedLM"
    ):
        convert(make_encoder("roberta", "AutoModelForCausalLM"), DHAConfig(head_budget=0.5), make_batches(1))


@torch.no_grad()
@pytest.mark.parametrize("family, auto, attn", RUNS)
def test_encoder(family: str, auto: str, attn: str):
    base, inputs = make_encoder(family, auto, attn), make_inputs(family)
    size, wanted = sum(p.numel() for p in base.parameters()), first_output(base, inputs)
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), calibration(family))
    torch.testing.assert_close(first_output(adapted, inputs), wanted, **CLOSE)
    adapted.base_model.tie_groups()
    tied = first_output(adapted, inputs)
    assert (tied - wanted).abs().max() > 1e-2
    plan = adapted.base_model.plan()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(first_output(merged, inputs), tied, **CLOSE)
    gone = (plan.heads_before - plan.heads_after) * HEAD_DIM * (HEADS * HEAD_DIM + 1)
    assert size - sum(p.numel() for p in merged.parameters()) == gone
    assert type(merged).__name__ == f"Dha{type(base).__name__}" and merged.config._attn_implementation == attn


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_planted_pairs_of_an_encoder_are_found_and_fused_for_nothing(family: str):
    base, inputs = make_encoder(family), make_inputs(family)
    pairs = [[plant(site, kind) for kind in ("key", "value")] for site in find_attention(base)]
    small = convert(base, DHAConfig(head_budget=0.5, allocation="uniform"), calibration(family, 4, 32))
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    torch.testing.assert_close(first_output(small, inputs), first_output(base, inputs), atol=1e-3, rtol=0)
