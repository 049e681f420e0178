"""`DHAModel`: peft's tuner for DHA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..attention import KINDS, AttentionSite, find_attention, labelled_plan
from ..fusion.collapse import SharedHeads, collapse
from ..models import FAMILIES, Family, build_merged
from ..plan import DHAPlan
from ..search import Analysis, analyse, check_budget
from .config import DHAConfig
from .fusion_state import HeadFusion
from .layer import DHALayer, remove_hooks
from .nesting import refuse_nested_adapters
from .unpacked import PARTS, pack, unpack


def target_modules(family: Family) -> list[str]:
    """Names of the modules that hold the keys and the values of a family, fused projections taken apart."""
    return [family.k, family.v] if family.packing == "separate" else [PARTS[kind] for kind in KINDS]


TARGET_MODULES = {name: target_modules(family) for name, family in FAMILIES.items()}
TIED = 1e-3
"""Fusion loss below which a collapse is taken to change the weights of heads too little to matter."""


class DHAModel(BaseTuner):
    """
    Adapter that fuses the key heads and the value heads of a pretrained transformer, group by group.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted; its weights stay frozen.
        config ([`DHAConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*): Create empty adapter weights, to be loaded.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from dha_peft import DHAConfig, get_dha_model

        >>> model = AutoModelForCausalLM.from_pretrained("path/or/id")
        >>> model = get_dha_model(model, DHAConfig(head_budget=0.25), calibration_data=batches)
        >>> smaller = model.merge_and_unload()
        ```
    """

    prefix: str = "dha_"
    tuner_layer_cls = DHALayer
    target_module_mapping = TARGET_MODULES

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: DHAConfig = self.peft_config[adapter_name]
        self._sites = find_attention(model)
        refuse_nested_adapters(self._sites)
        _note_slow_pairs(config, self._sites)
        if config.plan is None:
            check_budget(self._sites, config.search_options())
        else:
            check_plan(DHAPlan.from_dict(config.plan), self._sites)
        analysis = None
        if config.plan is None and config.grouping != "learned":
            analysis = analyse(model, None, config.grouping)
            config.plan = analysis.plan(config.search_options()).to_dict()
        unpack(self._sites)
        family = self._sites[0].family
        TARGET_MODULES.setdefault(family.model_type, target_modules(family))  # a family that a user registered
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _check_targets(self._sites)
        if config.plan is not None:
            self.set_plan(DHAPlan.from_dict(config.plan), adapter_name, analysis)
        if not config.init_weights:
            for layer in self._layers():
                layer.dha_fusion[adapter_name].randomize()

    def set_plan(self, plan: DHAPlan, adapter_name: str = "default", analysis: Analysis | None = None) -> None:
        """Give every layer its groups and, from an analysis, their frames; fusion matrices restart as identity.

        Raises:
            ValueError: the plan has other layers or heads than the model.
        """
        check_plan(plan, self._sites)
        layers = list(self._layers())
        if any(p.is_meta for layer in layers for p in layer.dha_fusion[adapter_name].parameters()):
            return
        frames = analysis.frames(plan) if analysis and self.peft_config[adapter_name].fusion == "aligned" else None
        for site, layer_plan in zip(self._sites, plan.layers, strict=True):
            for kind, groups in zip(KINDS, (layer_plan.key_groups, layer_plan.value_groups), strict=True):
                fusion = _layer(site, kind).dha_fusion[adapter_name]
                fusion.set_groups(groups, frames[site.index][kind] if frames else None)
        self.peft_config[adapter_name].plan = plan.to_dict()

    def plan(self, adapter_name: str = "default") -> DHAPlan:
        """The groups as the layers hold them now."""
        groups = [tuple(_layer(s, kind).dha_fusion[adapter_name].groups for kind in KINDS) for s in self._sites]
        return labelled_plan(self._sites, groups)

    def tie_groups(self, adapter_name: str = "default") -> None:
        """Tie every group at once: from the identity this is the closed form, without any training.

        Raises:
            ValueError: groups that are to be learned, before their search has run, or an adapter that is merged.
        """
        _check_learned(self.peft_config[adapter_name])
        if any(layer.merged for layer in self._layers()):
            raise ValueError(
                "the fused weights are merged into the base; call `unmerge_adapter()` before groups are tied."
            )
        for layer in self._layers():
            layer.dha_fusion[adapter_name].pull(0)
            layer.dha_fusion[adapter_name].freeze_unused()

    @torch.no_grad()
    def fusion_loss(self, adapter_name: str | None = None) -> float:
        """Mean fusion loss over layers and kinds of one adapter (default: the active one); 0 when every group is tied."""
        losses = [float(layer.fusion_loss(adapter_name)) for layer in self._layers()]
        return sum(losses) / len(losses)

    def _layers(self) -> list[DHALayer]:
        return [module for module in self.model.modules() if isinstance(module, DHALayer)]

    def _create_and_replace(
        self,
        peft_config: DHAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        inference = peft_config.inference_mode or adapter_name not in self.active_adapters
        if isinstance(target, DHALayer):
            target.update_layer(adapter_name, peft_config, inference)
            return
        layer = self._new_layer(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, inference)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, key: str) -> DHALayer:
        for site in self._sites:
            for kind in KINDS:
                if site.projection(kind) is target:
                    layer = DHALayer(target, kind, site.num_heads, site.layout(kind), key, site.gains(kind))
                    if kind == "key" and site.family.has_norm(site.module, "head_rms"):
                        layer.watch_norm(getattr(site.module, site.family.norm), site.family.norm_axis)
                    if layer.layout.slow:
                        layer.turn_queries(site)
                    return layer
        raise ValueError(
            f"`target_modules` names `{key}`, which is not a key or value projection of a supported attention block; "
            "leave `target_modules` empty to find them from the model's family."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            self.unmerge_adapter()
            return self._plain(super()._unload_and_optionally_merge(merge=False, progressbar=progressbar))
        name = self._adapter_to_merge(adapter_names)
        if name is None:
            return self._plain(super()._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names))
        _check_learned(self.peft_config[name])
        plan, sites = self.plan(name), self._sites
        refuse_nested_adapters(sites)
        _warn_untied(self.fusion_loss(name), all(_settled(layer.dha_fusion[name]) for layer in self._layers()))
        shared = [tuple(_layer(site, kind).shared_heads(name) for kind in KINDS) for site in sites]
        if safe_merge and not all(torch.isfinite(heads.shared).all() for pair in shared for heads in pair):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        # peft's own merge also merges adapters on other projections (LoRA on queries, output, MLP).
        model = self._plain(super()._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names))
        return collapse_model(model, sites, plan, shared)

    def _plain(self, model: nn.Module) -> nn.Module:
        """Fused projections in one piece again, and no hooks."""
        pack(self._sites)
        for site in self._sites:
            remove_hooks(site.module)
        return model

    def _adapter_to_merge(self, adapter_names: list[str] | None) -> str | None:
        names = self.active_adapters if adapter_names is None else adapter_names
        known = [n for n in names if any(n in layer.dha_fusion for layer in self._layers())]
        if len(known) > 1:
            raise ValueError(f"only one DHA adapter can be merged, but {known} were asked for; name one of them.")
        return known[0] if known else None


def collapse_model(
    model: nn.Module,
    sites: list[AttentionSite],
    plan: DHAPlan,
    shared: Iterable[tuple[SharedHeads, ...]],
    share: bool = True,
) -> nn.Module:
    """Collapse one layer after the other and build the merged model. `model` is the plain base; `share=False` copies its tensors."""
    with torch.no_grad():
        return build_merged(model, plan, map(_collapsed, sites, shared), share=share)


def _collapsed(site: AttentionSite, shared: tuple[SharedHeads, ...]) -> dict[str, Tensor]:
    keys, values = shared
    return site.flat_weights(collapse(site.weights(), keys, values), keys)


def check_plan(plan: DHAPlan, sites: list[AttentionSite]) -> None:
    """Raise ValueError unless the plan's layers and heads are the model's."""
    planned, actual = [layer.num_heads for layer in plan.layers], [site.num_heads for site in sites]
    if planned != actual or plan.head_dim != sites[0].head_dim:
        raise ValueError(
            f"the plan is for a base with {len(planned)} layers of {max(planned)} heads of {plan.head_dim}, but this model has "
            f"{len(actual)} layers of {max(actual)} heads of {sites[0].head_dim}; load the base that the adapter was made for."
        )
    for layer, site in zip(plan.layers, sites, strict=True):
        if layer.name and site.block != layer.name:
            raise ValueError(
                f"the plan names `{layer.name}` where this model has `{site.block}`; give the layers in the model's order."
            )


def _note_slow_pairs(config: DHAConfig, sites: list[AttentionSite]) -> None:
    """Write down how many rotary pairs the maps mix; raise ValueError if an adapter was made for another number."""
    if config.fusion != "aligned":
        return
    found = max(site.layout("key").slow for site in sites)
    if config.slow_pairs not in (None, found):
        raise ValueError(
            f"the adapter mixes {config.slow_pairs} slow rotary pairs of a key head, but this base has {found}; load it with the "
            "`max_position_embeddings` and RoPE parameters that it had when the adapter was made."
        )
    config.slow_pairs = found


def _check_targets(sites: list[AttentionSite]) -> None:
    for site in sites:
        for kind in KINDS:
            if not isinstance(_layer(site, kind), DHALayer):
                raise ValueError(
                    f"`target_modules` leaves out `{site.name}.{site.projection_name(kind)}`, but the keys and values of every "
                    "layer are part of the budget; leave `target_modules` empty to find them from the model's family."
                )


def _layer(site: AttentionSite, kind: str) -> DHALayer:
    return site.outer(kind)


def _check_learned(config: DHAConfig) -> None:
    if config.grouping == "learned" and config.plan is None and config.init_weights:
        raise ValueError(
            '`grouping="learned"` has no groups before its search has run; train with DHACallback first, or choose another grouping.'
        )


def _settled(fusion: HeadFusion) -> bool:
    """Whether the collapse keeps the function, if it keeps the weights."""
    return not fusion.jumps or bool(fusion.tied().all())


def _warn_untied(loss: float, settled: bool) -> None:
    if loss > TIED or not settled:
        warnings.warn(
            f"groups are not tied yet: the fusion loss is {loss:.2e}, so the collapse changes the model. "
            "Train on with DHACallback until it is near 0, or call `tie_groups()` for the closed form.",
            stacklevel=4,
        )
