"""Encoder-decoders go the same road: attention of the encoder, of the decoder, and from the decoder to the encoder."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model
from dha_peft.attention import find_attention
from dha_peft.models import FAMILIES

from .cases import HEAD_DIM, HEADS, VOCAB
from .test_planted import plant

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
AUTOS = {name: family.seq2seq for name, family in FAMILIES.items() if family.seq2seq}
FRAMES = 24
# Encoder and decoder differ in their number of layers.
SIZES = {
    "d_model": HEADS * HEAD_DIM, "vocab_size": VOCAB, "init_std": 0.3, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"num_layers": 1, "num_decoder_layers": 2, "num_heads": HEADS, "d_kv": HEAD_DIM, "d_ff": 48}
OWN = {
    "t5": T5,
    "mt5": T5,
    "whisper": {"num_mel_bins": 4, "max_source_positions": FRAMES // 2, "max_target_positions": 32},
}


def make_base(family: str, attn: str = "eager", auto: str = "", **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {"max_position_embeddings": 64}), **fields})
    base = getattr(transformers, auto or AUTOS[family]).from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("_proj.bias") or (OWN.get(family) is T5 and parameter.dim() > 1):
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
def test_encoder_decoder(family: str, attn: str):
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
    assert type(merged).__name__ == f"Dha{FAMILIES[family].prefix}ForConditionalGeneration"
    assert merged.config._attn_implementation == attn
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in make_base(family).parameters())

    cache = pair_cache(merged)
    merged(**batch, past_key_values=cache)
    roles = {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    for role, held in roles.items():
        planned = [(row.num_key_heads, row.num_value_heads) for row in plan.layers if row.role == role]
        assert [(layer.keys.shape[1], layer.values.shape[1]) for layer in held.layers] == planned
        unit = sum(t.shape[1] * t.shape[3] * 4 for layer in held.layers for t in (layer.keys, layer.values))
        assert plan.kv_bytes_per_token(4, role)[1] == unit
    assert plan.heads_after == round(plan.heads_before / 2) and len(plan.layers) == 5


@torch.no_grad()
@pytest.mark.parametrize("family", AUTOS)
def test_planted_pairs_are_found_and_fused_for_nothing(family: str):
    base = make_base(family)
    sites = find_attention(base)
    assert [site.role for site in sites] == ["encoder", "self", "cross", "self", "cross"]
    torch.manual_seed(2)
    pairs = [[plant(site, kind) for kind in ("key", "value")] for site in sites]
    small = convert(base, DHAConfig(head_budget=0.5, allocation="uniform"), [make_batch(family, 16)])
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    batch = make_batch(family)
    torch.testing.assert_close(small(**batch).logits, base(**batch).logits, atol=1e-3, rtol=0)


def test_every_trainable_parameter_gets_a_gradient():
    for family in AUTOS:
        adapted = get_dha_model(make_base(family), DHAConfig(head_budget=0.5), [make_batch(family)])
        labels = make_batch(family)["decoder_input_ids"]
        adapted(**make_inputs(family), labels=labels).loss.backward()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is not None for parameter in trained)


@torch.no_grad()
def test_padding_does_not_count():
    """Tokens under the padding change neither moments nor metrics, in encoder, decoder and between them."""
    from dha_peft.search.calibration import collect_statistics

    base, batch = make_base("bart"), make_batch("bart")
    sites = find_attention(base)
    found = []
    for filler in (0, 9):
        ids = {name: batch[name].masked_fill(batch[mask] == 0, filler) for name, mask in (
            ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))}  # fmt: skip
        found.append(collect_statistics(base, sites, [{**batch, **ids}]))
    for first, second in zip(found[0].moments, found[1].moments, strict=True):
        torch.testing.assert_close(first, second)
    for first, second in zip(found[0].metrics, found[1].metrics, strict=True):
        torch.testing.assert_close(first, second)
    assert found[0].tokens == 12


def test_what_is_not_supported_is_refused():
    small = DHAConfig(head_budget=0.5)
    with pytest.raises(ValueError, match="decoder.layers.0.self_attn` have 16 dimensions.*one head size"):
        convert(make_base("bart", decoder_attention_heads=HEADS // 2), small)
    with pytest.raises(ValueError, match=r"`encoder.layers.\*.self_attn`.*no attribute 'encoder'.*whole model"):
        convert(make_base("bart", auto="AutoModelForCausalLM"), small)
    with pytest.raises(
        ValueError, match="no `decoder_input_ids`.*yield dicts with `input_features`, `decoder_input_ids`"
    ):
        convert(make_base("whisper"), small, [make_inputs("whisper")])
    base = make_base("bart")
    plan = convert(base, small, [make_batch("bart")]).config.dha_plan
    swapped = {name: rows[::-1] if isinstance(rows, list) else rows for name, rows in plan.items()}
    with pytest.raises(
        ValueError, match="the plan names `decoder.layers.1.encoder_attn` where this model has `encoder"
    ):
        convert(base, DHAConfig(plan=swapped))
