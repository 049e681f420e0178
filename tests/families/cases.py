"""The shared matrix: one row per family, and a tiny random model for each row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dha_peft.models.families import FAMILIES

VOCAB, LAYERS, HEADS, HEAD_DIM = 64, 2, 8, 8


@dataclass(frozen=True)
class Case:
    """`fields` are config fields beyond the common ones; `kv_heads` below 8 makes a GQA base; `note` tells rows of one family apart."""

    family: str
    note: str = ""
    kv_heads: int = HEADS
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def attn(self) -> tuple[str, ...]:
        """Attention implementations that the base has."""
        sdpa = FAMILIES[self.family].base_class("ForCausalLM")._supports_sdpa
        return ("eager", "sdpa") if sdpa else ("eager",)

    def __str__(self) -> str:
        return f"{self.family}-{self.note}" if self.note else self.family


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WIDE, NARROW = {"head_dim": 16}, {"head_dim": HEAD_DIM}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


def both(family: str, **fields: Any) -> tuple[Case, Case]:
    """One KV head per query head, and one for two of them."""
    return Case(family, fields=fields), gqa(family, **fields)


def gqa(family: str, **fields: Any) -> Case:
    return Case(family, "gqa", kv_heads=HEADS // 2, fields=fields)


CASES: tuple[Case, ...] = (
    *both("llama"),
    *both("mistral", sliding_window=6),
    *both("mixtral", **MOE),
    *both("qwen2"),
    *both("qwen2_moe", **MOE, shared_expert_intermediate_size=16, decoder_sparse_step=1),
    *both("qwen3", **WIDE),
    *both("qwen3_moe", **MOE, **WIDE),
    *both("gemma", **WIDE),
    *both("gemma2", **WIDE, **WINDOW),
    *both("gemma3_text", **WIDE, **WINDOW),
    *both("olmo"),
    *both("olmo2"),
    *both("olmo3", **WINDOW),
    *both("olmoe", **MOE),
    *both("phi"),
    Case("phi", "norms", fields={"qk_layernorm": True}),
    *both("starcoder2"),
    *both("cohere"),
    Case("cohere", "norms", fields={"use_qk_norm": True}),
    *both("granite"),
    *both("smollm3", no_rope_layers=[1, 0]),
    *both("cohere2", **WINDOW, logit_scale=1.0),
    *both("glm", **NARROW),
    gqa("glm4", **NARROW),
    *both("glm4_moe", **NARROW, **MOE, n_routed_experts=4, n_group=1, topk_group=1, use_qk_norm=True),
    gqa("ernie4_5", **NARROW),
    gqa("exaone4", **WINDOW),
    gqa("apertus"),
    gqa("nemotron"),
    gqa("granitemoe", **MOE),
    gqa("seed_oss", **NARROW),
    gqa("ministral", **NARROW, **WINDOW),
    gqa("ministral3", **NARROW),
    gqa("phimoe", **MOE),
    *both("gpt_oss", **NARROW, **MOE, **WINDOW),
    *both("stablelm", use_qkv_bias=True),
    Case("stablelm", "norms", kv_heads=4, fields={"qk_layernorm": True}),
    *both("phi3", sliding_window=6),
    Case("gpt_neox"),
    Case("persimmon"),
    Case("persimmon", "plain", fields={"qk_layernorm": False}),
    Case("gpt2"),
    Case("gpt_bigcode", fields={"multi_query": False}),
    Case("opt", fields={"ffn_dim": 48, "word_embed_proj_dim": HEADS * HEAD_DIM}),
    Case("biogpt"),
    Case("gptj", fields={"rotary_dim": 4}),
    Case("gpt_neo", fields={"attention_types": [[["global", "local"], 1]], "window_size": 6}),
    Case("codegen", fields={"rotary_dim": 4}),
    Case("bloom"),
    Case("falcon", fields={"multi_query": False, "new_decoder_architecture": False, "bias": True}),
    Case("falcon", "new", fields={"new_decoder_architecture": True, "num_kv_heads": 4}),
    Case("falcon", "alibi", fields={"multi_query": False, "new_decoder_architecture": False, "alibi": True}),
    Case("mpt"),
    Case("xglm"),
)


def _layout(case: Case) -> str:
    """What a row has beyond the names of its family."""
    row = replace(FAMILIES[case.family], model_type="", prefix="", folder="", names={})
    return f"{row} {case.note} {case.kv_heads}"


DISTINCT: tuple[Case, ...] = tuple({_layout(case): case for case in reversed(CASES)}.values())
"""The first row of every layout, for tests in which families of one layout do not differ."""


@cache
def _made(index: int, attn: str) -> PreTrainedModel:
    case = CASES[index]
    sizes = {"vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": 64}
    if "intermediate_size" not in getattr(FAMILIES[case.family].base_class("Config"), "attribute_map", {}):
        sizes["intermediate_size"] = 48
    if (
        case.kv_heads != HEADS
        or "num_key_value_heads" in FAMILIES[case.family].base_class("Config").__dataclass_fields__
    ):
        sizes["num_key_value_heads"] = case.kv_heads
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(case.family, **{**sizes, **tokens, **case.fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Weights and biases of std 0.3, gains of norms around 1. Per-head norms of one layer share their gains."""
    for name, parameter in model.named_parameters():
        if "norm" in name.split(".")[-2].lower() or "ln_" in name or "norms." in name:
            torch.manual_seed(0 if "norms." in name else len(name))
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape[-1:]) if name.endswith("weight") else parameter * 0)
        else:
            parameter.normal_(std=0.3)


def make_base(case: Case, attn: str = "eager") -> PreTrainedModel:
    """The random model of a row; equal for equal arguments."""
    return copy.deepcopy(_made(CASES.index(case), attn))


def make_batches(count: int = 2, length: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCAB, (count, 2, length), generator=generator)
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


def prompts() -> dict[str, Tensor]:
    """Two prompts of 9 and 6 tokens, padded on the left."""
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
