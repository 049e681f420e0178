"""Tiny bases whose heads are equal within every group, so that the merged model must equal them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from dha_peft.models import family_of, register
from dha_peft.plan import DHAPlan, LayerPlan, contiguous_groups

HEADS, HEAD_DIM, VOCAB = 8, 8, 64

# Ragged and interleaved groups; separate counts of keys and values; and one layer that is plain GQA once permuted.
RAGGED = DHAPlan(
    (
        LayerPlan(((0, 3), (1, 2, 4), (5,), (6, 7)), ((0, 7), (1, 3, 5), (2, 4, 6))),
        LayerPlan(((0, 5), (1, 4), (2, 7), (3, 6)), ((0, 5), (1, 4), (2, 7), (3, 6))),
    ),
    HEAD_DIM,
)


def singletons(heads: int) -> DHAPlan:
    """The plan that merges nothing."""
    alone = contiguous_groups(heads, heads)
    return DHAPlan((LayerPlan(alone, alone),) * 2, HEAD_DIM)


def make_base(model_type: str, auto: str = "AutoModelForCausalLM", **fields: object) -> PreTrainedModel:
    """A random two-layer model; weights are large (std 0.3) so that small mistakes show."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, **tokens, **fields})
    return getattr(transformers, auto).from_config(config).eval()


@torch.no_grad()
def tie(base: PreTrainedModel, plan: DHAPlan) -> PreTrainedModel:
    """Copy the first head of each group over the others, in place; random biases where there are biases."""
    for attention, layer in zip(family_of(base.config).attentions(base.base_model), plan.layers, strict=True):
        for linear, groups in ((attention.k_proj, layer.key_groups), (attention.v_proj, layer.value_groups)):
            if linear.bias is not None:
                linear.bias.normal_()
            for tensor in (linear.weight, linear.bias):
                for group in groups if tensor is not None else ():
                    heads = tensor.view(layer.num_heads, HEAD_DIM, -1)
                    heads[list(group)] = heads[group[0]].clone()
    return base


def first_heads(base: PreTrainedModel, plan: DHAPlan) -> list[dict[str, Tensor]]:
    """Layer weights that keep the first head of every group."""
    out = []
    for attention, layer in zip(family_of(base.config).attentions(base.base_model), plan.layers, strict=True):
        weights = {}
        for name in "qkvo":
            linear = getattr(attention, f"{name}_proj")
            for key, tensor in ((name, linear.weight), (f"{name}_bias", linear.bias)):
                if tensor is not None:
                    weights[key] = _kept(tensor.detach(), name, layer)
        out.append(weights)
    return out


def _kept(tensor: Tensor, name: str, layer: LayerPlan) -> Tensor:
    groups = {"k": layer.key_groups, "v": layer.value_groups}.get(name)
    if groups is None:
        return tensor
    heads = tensor.view(layer.num_heads, HEAD_DIM, *tensor.shape[1:])
    return heads[[group[0] for group in groups]].flatten(0, 1)


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    torch.set_num_threads(1)
    register()


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts of 9 and 6 tokens, padded on the left: ids and mask `[2, 9]`."""
    torch.manual_seed(1)
    ids, mask = torch.randint(2, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


@pytest.fixture
def make_pair() -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """`make_pair(model_type, auto, plan, **fields)` -> a tied base and its merged model."""
    from dha_peft.models import build_merged

    def pair(model_type: str = "llama", auto: str = "AutoModelForCausalLM", plan: DHAPlan = RAGGED, **fields: object):
        base = tie(make_base(model_type, auto, **fields), plan)
        return base, build_merged(base, plan, first_heads(base, plan))

    return pair
