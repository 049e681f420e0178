"""Encoder-decoders go the same road: attention of the encoder, of the decoder, and from the decoder to the encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model
from dha_peft.attention import find_attention

from .cases import HEAD_DIM, HEADS, VOCAB
from .test_planted import plant

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
AUTOS = {"bart": "AutoModelForSeq2SeqLM", "whisper": "AutoModelForSpeechSeq2Seq"}
FRAMES = 24
# The decoder has other counts of layers and heads than the encoder; its heads are larger, too, which no plan can say.
SIZES = {
    "d_model": HEADS * HEAD_DIM, "vocab_size": VOCAB, "init_std": 0.3, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OWN = {
    "bart": {"max_position_embeddings": 64},
    "whisper": {"num_mel_bins": 4, "max_source_positions": FRAMES // 2, "max_target_positions": 32},
}


def make_base(family: str, attn: str = "eager", auto: str = "", **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **OWN[family], **fields})
    base = getattr(transformers, auto or AUTOS[family]).from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_(std=0.3)
    return base


def make_inputs(family: str, rows: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """What goes into the encoder: padded tokens, or sound."""
    generator = torch.Generator().manual_seed(seed)
    if family == "whisper":
        return {"input_features": torch.randn(rows, 4, FRAMES, generator=generator)}
    ids = torch.randint(3, VOCAB, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def make_batch(family: str, rows: int = 2, seed: int = 5) -> dict[str, Tensor]:
    """The same with the decoder's tokens."""
    ids = torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {**make_inputs(family, rows, seed), "decoder_input_ids": ids, "decoder_attention_mask": mask}


def pair_cache(model: PreTrainedModel) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", AUTOS)
def test_encoder_decoder(family: str, attn: str, tmp_path: Path):
    base, batch, inputs = make_base(family, attn), make_batch(family), make_inputs(family)
    wanted, tokens = base(**batch).logits, base.generate(**inputs, **GREEDY)
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), [make_batch(family, 8)])
    torch.testing.assert_close(adapted(**batch).logits, wanted, **CLOSE)
    assert torch.equal(adapted.generate(**inputs, **GREEDY), tokens)

    adapted.base_model.tie_groups()
    tied = adapted(**batch).logits
    roads = ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True})
    tokens = [adapted.generate(**inputs, **GREEDY, **options) for options in roads]
    assert (tied - wanted).abs().max() > 1e-2
    plan = adapted.base_model.plan()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, tied, **CLOSE)
    for options, expected in zip(roads, tokens, strict=True):
        assert torch.equal(merged.generate(**inputs, **GREEDY, **options), expected), options
