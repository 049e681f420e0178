"""Tiny random bases and batches for the tests of adapter, search and training."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

VOCAB, LAYERS, HEADS, HEAD_DIM = 64, 3, 8, 8
KV_PROJECTIONS = ("k_proj", "v_proj")
torch.set_num_threads(1)


@cache
def _made(model_type: str, auto: str, fields: tuple) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, **tokens, **dict(fields)})
    model = getattr(transformers, auto).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def make_base(model_type: str = "llama", auto: str = "AutoModelForCausalLM", **fields: object) -> PreTrainedModel:
    """A random model with large weights (std 0.3), so that small mistakes show; equal for equal arguments."""
    return copy.deepcopy(_made(model_type, auto, tuple(fields.items())))


def make_batches(count: int = 2, length: int = 24) -> list[dict[str, Tensor]]:
    """Batches of two rows; the second row is padded on the right."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(count):
        ids, mask = torch.randint(2, VOCAB, (2, length), generator=generator), torch.ones(2, length, dtype=torch.long)
        ids[1, -4:], mask[1, -4:] = 0, 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def make_ids(length: int = 9) -> Tensor:
    return torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model.eval()(make_ids() if ids is None else ids).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that the model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
