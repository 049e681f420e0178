"""The two doors of the package: a trainable adapter, and the one-shot conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from .adapter import DHAConfig
from .adapter.model import check_plan, collapse_model
from .adapter.nesting import refuse_adapted_model, refuse_nested_adapters
from .attention import KINDS, AttentionSite, find_attention
from .fusion.collapse import SharedHeads
from .plan import DHAPlan, Groups
from .search import Analysis, analyse, check_budget
from .search.analysis import Frames

Batches = Iterable[dict[str, Any]]


def get_dha_model(
    model: nn.Module,
    config: DHAConfig,
    calibration_data: Batches | None = None,
    adapter_name: str = "default",
    analysis: Analysis | None = None,
) -> PeftModel:
    """A `PeftModel` over `DHAModel`, ready for training: equal to `model` until the fusion starts.

    Args:
        model: a transformers model of a supported family; its weights stay frozen.
        config: the budget and the method. It is not changed.
        calibration_data: batches with `input_ids` `[batch, length]` and, if padded, `attention_mask`; None compares the
            weights alone.
        analysis: reuses the search of an earlier call on the same model for another budget.

    Raises:
        ValueError: a budget below one head per layer, an unsupported model, unusable calibration data or weights.
    """
    config = copy.deepcopy(config)
    if config.grouping == "learned" or config.plan is not None:
        return get_peft_model(model, config, adapter_name=adapter_name)
    sites = find_attention(model)
    refuse_nested_adapters(sites)
    check_budget(sites, config.search_options())
    analysis = analysis or analyse(model, calibration_data, config.grouping)
    plan = analysis.plan(config.search_options())
    config.plan = plan.to_dict()
    adapted = get_peft_model(model, config, adapter_name=adapter_name)
    if config.init_weights:
        adapted.base_model.set_plan(plan, adapter_name, analysis)
    return adapted


def convert(
    model: nn.Module, config: DHAConfig, calibration_data: Batches | None = None, analysis: Analysis | None = None
) -> nn.Module:
    """The merged model in one shot, by the closed form and without training. `model` is left as it is.

    `analysis` reuses the search of an earlier call on the same model for another budget.

    Raises:
        ValueError: see `get_dha_model`; also `grouping="learned"`, which needs training.
    """
    if config.grouping == "learned":
        raise ValueError('`grouping="learned"` needs training; use `get_dha_model`, or another grouping.')
    refuse_adapted_model(model)
    plan = _given_plan(model, config)
    analysis = analysis or analyse(model, calibration_data, config.grouping)
    plan = plan or analysis.plan(config.search_options())
    return collapse_model(model, analysis.sites, plan, closed_form(analysis, plan, config.fusion), share=False)


def _given_plan(model: nn.Module, config: DHAConfig) -> DHAPlan | None:
    """The plan in the config, if any; plan or budget are checked against the model before the calibration starts."""
    sites = find_attention(model)
    if config.plan is None:
        check_budget(sites, config.search_options())
        return None
    plan = DHAPlan.from_dict(config.plan)
    check_plan(plan, sites)
    return plan


def closed_form(analysis: Analysis, plan: DHAPlan, fusion: str = "aligned") -> Iterator[tuple[SharedHeads, ...]]:
    """Shared heads and read-outs of one layer after the other; `fusion="linear"` is mean pooling."""
    for site, layer in zip(analysis.sites, plan.layers, strict=True):
        frames = analysis.layer_frames(site.index, layer) if fusion == "aligned" else None
        yield tuple(
            _shared(site, kind, groups, frames[kind] if frames else None)
            for kind, groups in zip(KINDS, (layer.key_groups, layer.value_groups), strict=True)
        )


def _shared(site: AttentionSite, kind: str, groups: Groups, frames: Frames | None) -> SharedHeads:
    heads = site.heads(kind)
    layout = site.layout(kind).to(heads.device)
    if frames is None:
        return SharedHeads(groups, torch.stack([heads[list(group)].mean(0) for group in groups]), None, layout)
    into, out = frames.into.to(heads.device), frames.out.to(heads.device)
    shared = [into.select(list(group)).apply(heads[list(group)], layout).sum(0) for group in groups]
    return SharedHeads(groups, torch.stack(shared), out, layout)
