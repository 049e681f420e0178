"""The ablation without fusion: each group keeps one of its heads as it is, and the others read it through the best map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dha_peft import Analysis, DHAPlan
from dha_peft.adapter.model import collapse_model
from dha_peft.attention import KINDS
from dha_peft.fusion.collapse import SharedHeads
from dha_peft.fusion.heads import FrameLayout, HeadMaps
from dha_peft.fusion.moments import head_gram


def keep_members(model: nn.Module, analysis: Analysis, plan: DHAPlan) -> nn.Module:
    """The merged model whose shared heads are the groups' best members."""
    shared = []
    for site, layer in zip(analysis.sites, plan.layers, strict=True):
        weights, pair = site.weights(), []
        for kind, heads, groups in zip(
            KINDS, (weights.key, weights.value), (layer.key_groups, layer.value_groups), strict=True
        ):
            moment, layout = analysis.statistics.moments[site.index].double(), site.layout(kind).to(heads.device)
            metric = analysis.statistics.metrics[site.index][kind].double()
            kept, out = best_members(head_gram(heads.to(moment), moment), metric, layout.to(moment.device), groups)
            shared_heads = heads[[kept[group[0]] for group in groups]]
            pair.append(SharedHeads(groups, shared_heads, out.to(heads.device, torch.float32), layout))
        shared.append(tuple(pair))
    return collapse_model(model, analysis.sites, plan, shared, share=False)


def best_members(gram: Tensor, metric: Tensor, layout: FrameLayout, groups) -> tuple[list[int], HeadMaps]:
    """For every head the member that its group keeps, and the map that reads the head back from it (least squares). The best member
    is the one with the least metric error. `gram` `[H, H, d, d]`, `metric` `[H, d, d]`."""
    count = len(gram)
    kept, maps = list(range(count)), HeadMaps.identity(count, layout, dtype=gram.dtype, device=gram.device)
    for group in (list(group) for group in groups if len(group) > 1):
        choices = [read_from(gram, layout, group, member) for member in group]
        errors = [_error(gram, metric, layout, group, m, out) for m, out in zip(group, choices, strict=True)]
        best = errors.index(min(errors))
        for head in group:
            kept[head] = group[best]
        maps.pair[group], maps.full[group] = choices[best].pair, choices[best].full
    return kept, maps


def read_from(gram: Tensor, layout: FrameLayout, group: list[int], member: int) -> HeadMaps:
    """Least-squares maps `B_i = G_im G_mm^+` that turn head `member` into every head of the group."""
    first, second = layout.pairs.unbind(1)
    cross, own = gram[group, member], gram[member, member]
    real = cross[:, first, first] + cross[:, second, second]
    imag = cross[:, second, first] - cross[:, first, second]
    energy = (own[first, first] + own[second, second]).clamp_min(torch.finfo(gram.dtype).tiny)
    rest = gram[:, :, layout.rest[:, None], layout.rest]
    maps = HeadMaps(
        torch.stack([real, imag], -1) / energy[:, None], rest[group, member] @ torch.linalg.pinv(rest[member, member])
    )
    return maps.restricted(layout)


def _error(gram: Tensor, metric: Tensor, layout: FrameLayout, group: list[int], member: int, out: HeadMaps) -> float:
    """`sum_i trace M_i E[(W_i - B_i W_m) x ((W_i - B_i W_m) x)^T]`."""
    total = 0.0
    for index, head in enumerate(group):
        mapped = out.select([index])
        cross = mapped.apply(gram[member, head][None], layout)[0]
        read = mapped.apply(mapped.apply(gram[member, member][None], layout).transpose(1, 2), layout)[0]
        error = gram[head, head] - cross - cross.T + read
        total += float((metric[head] * error.T).sum())
    return total
