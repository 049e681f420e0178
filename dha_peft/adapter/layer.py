"""`DHALayer`: a projection whose key heads or value heads are fused step by step."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..attention import AttentionSite
from ..fusion.collapse import SharedHeads
from ..fusion.heads import FrameLayout
from ..fusion.operator import distances, fusion_loss
from .config import DHAConfig
from .fusion_state import HeadFusion


class DHALayer(nn.Module, BaseTunerLayer):
    """Wraps the key or the value projection of an attention block.

    `key` is its path in the model, for messages. `gains` `[H, d]` of a norm after the projection multiply the heads, which are
    then fused with them. The base weight stays frozen; the forward uses the fused weight `[H d, D]`, which keeps the base's shape until the collapse.
    """

    adapter_layer_names: tuple[str, ...] = ("dha_fusion",)
    other_param_names: tuple[str, ...] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        kind: str,
        num_heads: int,
        layout: FrameLayout,
        key: str = "",
        gains: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._gains = gains
        self.base_layer = base_layer
        self.kind, self.num_heads, self.layout, self.key = kind, num_heads, layout, key
        self.dha_fusion = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[Tensor, Tensor | None] | None = None

    def update_layer(self, adapter_name: str, config: DHAConfig, inference_mode: bool = False) -> None:
        """Add an adapter, all heads in one group until groups are set."""
        fusion = HeadFusion(self.num_heads, self.layout, config.fusion == "aligned", config.train_frames)
        device = self.get_base_layer().weight.device
        if not fusion.omega.is_meta:  # empty while peft loads with low_cpu_mem_usage
            fusion.to(device)
        self.dha_fusion[adapter_name] = fusion
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = [name for name in names if name in self.dha_fusion]
        if len(known) > 1:
            raise ValueError(f"only one DHA adapter can be active, but {known} were asked for; set one of them.")
        super().set_adapter(names, inference_mode)
        for fusion in self.dha_fusion.values():
            fusion.freeze_unused()

    def active_fusion(self) -> HeadFusion | None:
        """The active adapter's state, if there is one."""
        names = [name for name in self.active_adapters if name in self.dha_fusion]
        return self.dha_fusion[names[0]] if names else None

    def watch_norm(self, norm: nn.Module, axis: int) -> None:
        """Keys are normalised head by head, by `norm`, with heads on `axis` of its input: see `_renormalise`."""
        self._norm_axis = axis
        norm.register_forward_hook(self._renormalise)

    def turn_queries(self, site: AttentionSite) -> None:
        """Keys of this layout mix slow rotary pairs, so the read-outs of tied heads go where the collapse will have them: to the
        queries of the block. See `HeadFusion.tied`."""
        self._site = site
        site.module.register_forward_pre_hook(self._follow_queries)

    def _follow_queries(self, _block: nn.Module, _args: tuple[Any, ...]) -> None:
        """Other adapters may have been put around the query projection, whose output counts too."""
        projection = self._site.outer("query")
        if not _has_hook(projection, self):
            remove_hooks(projection)
            projection.register_forward_hook(self._turn_queries)

    def _turn_queries(self, _projection: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        fusion = self._applied_fusion()
        if fusion is None or not fusion.jumps:
            return None
        with torch.autocast(output.device.type, enabled=False):
            turns = fusion.query_turns().to(output.dtype)
        queries, rest = output.unflatten(-1, (-1, self.layout.head_dim)), self.layout.to(output.device).rest
        turns = turns.repeat_interleave(self._site.num_query_heads // self.num_heads, 0)
        turned = torch.einsum("...hr,hrs->...hs", queries[..., rest], turns)
        return queries.index_copy(-1, rest, turned.to(output.dtype)).flatten(-2)

    def _applied_fusion(self) -> HeadFusion | None:
        """The adapter whose fused weight the forward uses."""
        if self.merged:
            return None if self.disable_adapters else self.dha_fusion[self.merged_adapters[0]]
        return None if self.disable_adapters else self.active_fusion()

    def _renormalise(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Let heads of one group be divided by one norm, as they are fused: by that of the head turned back into its group's
        frame, in the measure in which it no longer is its own. Then the collapse, which has one norm per group, is exact."""
        fusion = self._applied_fusion()
        if fusion is None:
            return None
        with torch.autocast(output.device.type, enabled=False):
            ratio = self._norm_ratio(fusion, args[0].float().movedim(self._norm_axis, 0), norm)
            return (output.float() * ratio.movedim(0, self._norm_axis)).to(output.dtype)

    def _norm_ratio(self, fusion: HeadFusion, keys: Tensor, norm: nn.Module) -> Tensor:
        """`keys` `[H, ..., d]` as the projection gives them -> `[H, ..., 1]`."""
        gains = self._gains.to(keys.device)[:, :, None]
        heads = keys.flatten(1, -2).transpose(1, 2)
        shared = fusion.maps()[1] if fusion.aligned else None
        turned = (
            heads if shared is None else shared.transpose().apply(heads * gains, self.layout.to(keys.device)) / gains
        )
        share = fusion.own_share()[:, None]
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        own, common = heads.square().mean(1), turned.square().mean(1)
        ratio = ((own + eps) / (share * own + (1 - share) * common + eps).clamp_min(eps)).sqrt()
        return ratio.reshape(*keys.shape[:-1], 1)

    def base_heads(self) -> Tensor:
        """The base's heads `[H, d, E]` in float32; a bias is the last input column."""
        weight, bias = self._unmerged if self._unmerged is not None else self._weight_and_bias()
        weight = weight.detach().float()
        if bias is not None:
            weight = torch.cat([weight, bias.detach().float()[:, None]], dim=1)
        heads = weight.reshape(self.num_heads, -1, weight.shape[1])
        return heads if self._gains is None else heads * self._gains.to(heads.device)[..., None]

    def fused_weight(self, fusion: HeadFusion) -> tuple[Tensor, Tensor | None]:
        """Weight `[H d, D]` and bias of the projection as the adapter makes it, in the base's dtype."""
        base = self.get_base_layer()
        with torch.autocast(base.weight.device.type, enabled=False):
            fused = fusion.fuse(self.base_heads())
            heads = fusion.in_frame(fused) if fusion.jumps else fused.heads
            heads = heads if self._gains is None else heads / self._gains.to(heads.device)[..., None]
            rows = heads.flatten(0, 1).to(base.weight.dtype)
        return (rows, None) if base.bias is None else (rows[:, :-1], rows[:, -1])

    def distances(self, adapter_name: str | None = None) -> tuple[Tensor, Tensor]:
        """Squared distance of every head from its collapse, and the energy of the base's head, `[H]` each; of one adapter, by default
        the active one."""
        fusion = self.active_fusion() if adapter_name is None else self.dha_fusion[adapter_name]
        with torch.autocast(self.get_base_layer().weight.device.type, enabled=False):
            heads = self.base_heads()
            return distances(heads, fusion.fuse(heads))

    def fusion_loss(self, adapter_name: str | None = None) -> Tensor:
        """Fusion loss of one adapter on this projection; of the active one by default."""
        return fusion_loss(*self.distances(adapter_name))

    def shared_heads(self, adapter_name: str) -> SharedHeads:
        """What the collapse needs of this projection."""
        fusion = self.dha_fusion[adapter_name]
        with torch.no_grad():
            shared = fusion.fuse(self.base_heads()).shared
        out = fusion.maps()[1]
        shared = shared[[group[0] for group in fusion.groups]]
        return SharedHeads(fusion.groups, shared, out, self.layout.to(shared.device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fusion = self.active_fusion()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or fusion is None:
            return self.base_layer(x, *args, **kwargs)
        return nn.functional.linear(x, *self.fused_weight(fusion))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the fused weight, of unchanged shape, into the base layer; a copy of the base's weight is kept."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.dha_fusion]
        if not names:
            return
        if self.merged or len(names) > 1:
            raise ValueError("only one DHA adapter can be merged at a time; call `unmerge_adapter()` first.")
        with torch.no_grad():
            weight, bias = self.fused_weight(self.dha_fusion[names[0]])
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        base = self.get_base_layer()
        self._unmerged = tuple(None if t is None else t.detach().clone() for t in self._weight_and_bias())
        base.weight.data.copy_(weight)
        if bias is not None:
            base.bias.data.copy_(bias)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the base's weight back, exactly."""
        if not self.merged:
            return
        base = self.get_base_layer()
        weight, bias = self._unmerged
        base.weight.data.copy_(weight)
        if bias is not None:
            base.bias.data.copy_(bias)
        self._unmerged = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        base = self.get_base_layer()
        return base.weight, base.bias

    def __repr__(self) -> str:
        return "dha." + super().__repr__()


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of all `DHALayer`s from a module and what is in it."""
    for inner in module.modules():
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), DHALayer)]:
                del hooks[key]


def _has_hook(module: nn.Module, layer: DHALayer) -> bool:
    return any(getattr(hook, "__self__", None) is layer for hook in module._forward_hooks.values())
