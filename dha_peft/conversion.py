"""The two doors of the package: a trainable adapter, and the one-shot conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .adapter import DHAConfig
from .adapter.model import check_plan, collapse_model
from .adapter.nesting import refuse_adapted_model, refuse_nested_adapters
from .attention import KINDS, find_attention
from .fusion.collapse import SharedHeads
from .fusion.heads import HeadMaps
from .fusion.operator import fuse, same_group
from .plan import DHAPlan
from .search import Analysis, analyse, check_budget

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


def closed_form(analysis: Analysis, plan: DHAPlan, fusion: str = "aligned") -> list[tuple[SharedHeads, ...]]:
    """Shared heads and read-outs of every layer; `fusion="linear"` is mean pooling."""
    frames = analysis.frames(plan) if fusion == "aligned" else None
    shared = []
    for site, layer in zip(analysis.sites, plan.layers, strict=True):
        weights = site.weights()
        pair = []
        for kind, heads, groups in zip(
            KINDS, (weights.key, weights.value), (layer.key_groups, layer.value_groups), strict=True
        ):
            pair.append(_shared(site.layout(kind), heads, groups, frames[site.index][kind] if frames else None))
        shared.append(tuple(pair))
    return shared


def _shared(layout, heads, groups, frame) -> SharedHeads:
    together = same_group(groups).to(heads.device)
    size = together.sum(1).to(heads.dtype)[:, None, None]
    into = HeadMaps(frame.into.pair * size, frame.into.full * size) if frame else None
    out = frame.out if frame else None
    layout = layout.to(heads.device)
    fused = fuse(heads, together / together.sum(1, keepdim=True), together, into, out, layout)
    return SharedHeads(groups, fused.shared, out, layout)
