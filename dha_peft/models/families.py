"""The table of model families. Adding a family is one row here and one row in the shared tests (`tests/families`)."""

from __future__ import annotations

from typing import Any

from .family import Family, Stack, get_path, head_size, rotary_pairs, rotary_size

_NEOX = {"q": "query_key_value", "k": "query_key_value", "v": "query_key_value", "o": "dense"}
_GPT2 = {"layers": "h", "attention": "attn", "q": "c_attn", "k": "c_attn", "v": "c_attn", "o": "c_proj"}
_CAUSAL_GPT2 = {"ForCausalLM": "GPT2LMHeadModel"}
_CODEGEN = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "o": "out_proj"}
_GEMMA3 = {
    "Config": "Gemma3TextConfig",
    "Model": "Gemma3TextModel",
    "ForSequenceClassification": "Gemma3TextForSequenceClassification",
}
_BART = (
    Stack("encoder.layers", {"self_attn": "encoder"}, "encoder_layers", "encoder_attention_heads"),
    Stack(
        "decoder.layers", {"self_attn": "self", "encoder_attn": "cross"}, "decoder_layers", "decoder_attention_heads"
    ),
)
_T5 = {
    "stacks": (
        Stack("encoder.block", {"layer.0.SelfAttention": "encoder"}, "num_layers", "num_heads"),
        Stack(
            "decoder.block", {"layer.0.SelfAttention": "self", "layer.1.EncDecAttention": "cross"},
            "num_decoder_layers", "num_heads",
        ),
    ),
    "seq2seq": "AutoModelForSeq2SeqLM", "position": "none", "reorder": False, **{name: name for name in "qkvo"},
}  # fmt: skip
_BERT = {
    "stacks": (Stack("encoder.layer", {"attention": "encoder"}),),
    "position": "none",
    "q": "self.query",
    "k": "self.key",
    "v": "self.value",
    "o": "output.dense",
}
_DISTIL = {
    "stacks": (Stack("transformer.layer", {"attention": "encoder"}),),
    "position": "none",
    "q": "q_lin",
    "k": "k_lin",
    "v": "v_lin",
    "o": "out_lin",
}
_SEQ2SEQ = {"stacks": _BART, "seq2seq": "AutoModelForSeq2SeqLM", "o": "out_proj", "position": "none"}
# Forwards that want every head, and that compute attention themselves.
_OWN = {"gather": True, "dispatch": False, "reorder": False}
_CORE = {**_OWN, "core": "_attn"}

ROWS: tuple[Family, ...] = (
    # Separate projections whose forward takes any number of key and value heads.
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("mixtral", "Mixtral"),
    Family("qwen2", "Qwen2"),
    Family("qwen2_moe", "Qwen2Moe"),
    Family("qwen3", "Qwen3", key_norm="head_rms"),
    Family("qwen3_moe", "Qwen3Moe", key_norm="head_rms"),
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma2"),
    Family("gemma3_text", "Gemma3", key_norm="head_rms", norm_axis=1, folder="gemma3", names=_GEMMA3),
    Family("olmo", "Olmo"),
    Family("olmo2", "Olmo2", key_norm="all_rms", reorder=False),
    Family("olmo3", "Olmo3", key_norm="all_rms", reorder=False),
    Family("olmoe", "Olmoe", key_norm="all_rms", reorder=False),
    Family("phi", "Phi", o="dense", key_norm="head_layer", norm="k_layernorm"),
    Family("starcoder2", "Starcoder2"),
    Family("cohere", "Cohere", position="interleaved", key_norm="head_layer", reorder=False),
    Family("granite", "Granite"),
    Family("smollm3", "SmolLM3"),
    Family("cohere2", "Cohere2", position="interleaved", rope_flag="sliding_window"),
    Family("glm", "Glm", position="interleaved"),
    Family("glm4", "Glm4", position="interleaved"),
    Family("glm4_moe", "Glm4Moe", key_norm="head_rms"),
    Family("ernie4_5", "Ernie4_5", position="interleaved"),
    Family("exaone4", "Exaone4", key_norm="head_rms", norm_axis=1),
    Family("apertus", "Apertus", key_norm="head_rms", norm_axis=1),
    Family("nemotron", "Nemotron"),
    Family("granitemoe", "GraniteMoe"),
    Family("seed_oss", "SeedOss"),
    Family("ministral", "Ministral"),
    Family("ministral3", "Ministral3"),
    Family("phimoe", "Phimoe"),
    Family("gpt_oss", "GptOss", reorder=False),
    # Fused projections, or forwards that count on one key and value head per query head.
    Family("stablelm", "StableLm", key_norm="head_layer", norm="k_layernorm", reorder=False, gather=True),
    Family("phi3", "Phi3", q="qkv_proj", k="qkv_proj", v="qkv_proj", packing="blocks", gather=True),
    Family("gpt_neox", "GPTNeoX", attention="attention", packing="heads", gather=True, **_NEOX),
    Family("persimmon", "Persimmon", packing="heads", gather=True, key_norm="head_layer", norm="k_layernorm", **_NEOX),
    Family("gpt2", "GPT2", packing="blocks", position="none", gather=True, names=_CAUSAL_GPT2, **_GPT2),
    Family("gpt_bigcode", "GPTBigCode", packing="heads", position="none", gather=True, **_GPT2),
    Family("opt", "OPT", layers="decoder.layers", o="out_proj", position="none", gather=True),
    Family("biogpt", "BioGpt", o="out_proj", position="none", gather=True),
    Family("gptj", "GPTJ", layers="h", attention="attn", o="out_proj", position="interleaved", **_CORE),
    Family("gpt_neo", "GPTNeo", layers="h", attention="attn.attention", o="out_proj", position="none", **_CORE),
    Family(
        "codegen", "CodeGen", layers="h", attention="attn", packing="codegen", position="interleaved", **_CODEGEN, **_CORE
    ),
    Family("bloom", "Bloom", layers="h", attention="self_attention", packing="heads", position="none", **_NEOX, **_OWN),
    Family("falcon", "Falcon", layers="h", attention="self_attention", packing="heads", **_NEOX, **_OWN),
    Family(
        "mpt", "Mpt", layers="blocks", attention="attn", packing="blocks", position="none",
        q="Wqkv", k="Wqkv", v="Wqkv", o="out_proj", **_OWN,
    ),
    Family("xglm", "XGLM", o="out_proj", position="none", **_OWN),
    # Encoders: no cache; the merged model has fewer weights.
    Family("bert", "Bert", **_BERT, **_OWN),
    Family("roberta", "Roberta", **_BERT, **_OWN),
    Family("xlm-roberta", "XLMRoberta", folder="xlm_roberta", **_BERT, **_OWN),
    Family("electra", "Electra", **_BERT, **_OWN),
    Family("distilbert", "DistilBert", **_DISTIL),
    Family("vit", "ViT", stacks=(Stack("layers", {"attention": "encoder"}),), position="none"),
    # Encoder-decoders: attention of the encoder, of the decoder, and between them.
    Family("bart", "Bart", **_SEQ2SEQ),
    Family("mbart", "MBart", **_SEQ2SEQ),
    Family("pegasus", "Pegasus", **_SEQ2SEQ),
    Family("marian", "Marian", names={"ForConditionalGeneration": "MarianMTModel"}, **_SEQ2SEQ),
    Family("m2m_100", "M2M100", **_SEQ2SEQ),
    Family("t5", "T5", **_T5),
    Family("mt5", "MT5", **_T5),
    Family(
        "whisper", "Whisper", stacks=_BART, seq2seq="AutoModelForSpeechSeq2Seq", source_mask=False,
        o="out_proj", position="none", gather=True,
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {row.model_type: row for row in ROWS}


def family_of(config: Any) -> Family:
    """Row of a base model, by its config.

    Raises:
        ValueError: the type is not in the table, is already a merged one, is made of several models (text and images), or has
            multi-head latent attention.
    """
    model_type = config.model_type
    if model_type.startswith("dha_"):
        raise ValueError(
            f"a model of type `{model_type}` is already a merged DHA model; give the base model it was made from."
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    text = config.get_text_config(decoder=True)
    if text.model_type != model_type:
        raise ValueError(
            f"a model of type `{model_type}` is made of several models; convert its language model (of type `{text.model_type}`, "
            "most often at `model.model.language_model`) alone and put the result in its place (see docs/families.md)."
        )
    if config.to_dict().get("kv_lora_rank"):
        raise ValueError(
            f"a model of type `{model_type}` caches one latent per token instead of key and value heads (multi-head latent "
            "attention), so there is nothing to fuse; choose a model with multi-head or grouped-query attention."
        )
    raise ValueError(
        f"`config.model_type` is `{model_type}`, which is no row of the table of model families, so it is unknown where "
        "its layers, attention and query, key, value and output projections are; supported types are "
        f"{', '.join(sorted(FAMILIES))}. Add a row with `dha_peft.register_family` (see docs/families.md)."
    )


__all__ = ["FAMILIES", "ROWS", "Family", "family_of", "get_path", "head_size", "rotary_pairs", "rotary_size"]
