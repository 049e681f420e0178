"""One run over the calibration data: second moments of what enters every attention block, and, where the loss
decides how much an error matters, second moments of the loss gradient at every key and value head (ours)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import AttentionSite
from ..fusion.moments import MomentAccumulator, identity_moment, output_metric, query_metric
from ..models import Family

Batch = dict[str, Any]


@dataclass
class Statistics:
    """`moments[l]` `[E, E]`; `metrics[l][kind]` `[H, d, d]`, how an error in a head's output moves the loss."""

    moments: list[Tensor]
    metrics: list[dict[str, Tensor]]
    tokens: int = 0
    in_nats: bool = field(default=False)


def collect_statistics(
    model: nn.Module, sites: list[AttentionSite], data: Iterable[Batch] | None, gradient_tokens: int = 16_384
) -> Statistics:
    """Run `data` through the model. Without data: white inputs and the weights' own metrics, with a warning.

    The first `gradient_tokens` tokens also go backwards, with labels drawn from the model itself (a Fisher metric,
    so no labels are needed); models without logits keep the weights' metrics.

    Raises:
        ValueError: a batch without `input_ids` or with tokens that the model does not know, no batch at all, or weights that
            are not finite.
    """
    _check_weights(model)
    if data is None:
        warnings.warn(
            "no `calibration_data`: heads are compared by their weights alone, which costs quality; "
            "pass a few batches with `input_ids` of typical text.",
            stacklevel=3,
        )
        return _weights_only(sites)
    moments = [_Moments(site) for site in sites]
    fisher = [_FisherAccumulator(site) for site in sites]
    batches = _checked(data, needed_names(model, sites[0].family), _vocabulary(model))
    tokens = _run(model, sites, batches, moments, fisher, gradient_tokens)
    means = [moment.keys.mean() for moment in moments]
    metrics = [weight_metrics(s, m.queries.mean()) for s, m in zip(sites, moments, strict=True)]
    if fisher[0].count:
        metrics = [_blend(f.metrics(), own) for f, own in zip(fisher, metrics, strict=True)]
    return Statistics(means, metrics, tokens, in_nats=bool(fisher[0].count))


def _blend(fisher: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Equal parts of the Fisher metric and of the weights' own, on the Fisher metric's scale: the Fisher metric knows what
    matters to the loss, the other is not fooled by directions whose gradient is small only for small errors."""
    return {kind: fisher[kind] + own[kind] * (_trace(fisher[kind]) / _trace(own[kind])) for kind in fisher}


def _trace(metric: Tensor) -> Tensor:
    return metric.diagonal(dim1=-2, dim2=-1).sum().clamp_min(torch.finfo(metric.dtype).tiny)


def weight_metrics(site: AttentionSite, moment: Tensor) -> dict[str, Tensor]:
    """Metrics (ours) from weights and the moment of what the queries see: query energy for keys, output weights for values."""
    weights = site.weights().to(moment.device)
    return {"key": query_metric(weights, moment), "value": output_metric(weights)}


def _weights_only(sites: list[AttentionSite]) -> Statistics:
    moments = []
    for site in sites:
        weight = site.projection("key").weight
        moments.append(identity_moment(site.input_size, site.has_bias, device=weight.device))
    return Statistics(moments, [weight_metrics(s, m) for s, m in zip(sites, moments, strict=True)])


class _Moments:
    """Moments of what enters one block's keys and its queries: the same, except in cross-attention."""

    def __init__(self, site: AttentionSite) -> None:
        device = site.projection("key").weight.device
        self.site, self.keys = site, MomentAccumulator(site.input_size, site.has_bias, device)
        self.queries = self.keys
        if site.role == "cross":
            self.queries = MomentAccumulator(site.input_size, site.has_bias, device)

    def watch(self, masks: dict[str, Tensor | None]) -> list[Any]:
        """Hooks that feed the accumulators; padding, by the mask of each role, does not count."""
        source = "encoder" if self.site.role == "cross" else self.site.role
        handles = [self._hook("key", self.keys, masks[source])]
        return handles if self.queries is self.keys else [*handles, self._hook("query", self.queries, masks["self"])]

    def _hook(self, kind: str, moment: MomentAccumulator, mask: Tensor | None) -> Any:
        def hook(_module, inputs):
            rows = inputs[0].detach().flatten(0, -2)
            moment.add(rows if mask is None else rows[mask.flatten().bool()])

        return self.site.projection(kind).register_forward_pre_hook(hook)


class _FisherAccumulator:
    """Sums `g g^T` per head, `g` the gradient of the summed loss at the projection's output."""

    def __init__(self, site: AttentionSite) -> None:
        self.heads, self.dim, self.count = site.num_heads, site.head_dim, 0
        device = site.projection("key").weight.device
        self.total = {kind: torch.zeros(self.heads, self.dim, self.dim, device=device) for kind in ("key", "value")}

    def add(self, kind: str, gradient: Tensor) -> None:
        heads = gradient.float().reshape(-1, self.heads, self.dim).transpose(0, 1)
        self.total[kind] += heads.transpose(1, 2) @ heads

    def metrics(self) -> dict[str, Tensor]:
        return {kind: total / self.count for kind, total in self.total.items()}


def _run(model, sites, data, moments, fisher, gradient_tokens: int) -> int:
    training, tokens = model.training, 0
    model.eval()
    try:
        for batch in tqdm(data, desc="calibrating", unit="batch", disable=None):
            batch = {key: value.to(_device(model)) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs = {key: batch[key] for key in input_names(model, sites[0].family) if key in batch}
            with _recording(moments, _masks(inputs, sites[0].family)):
                backwards = fisher[0].count < gradient_tokens
                counted = _backward(model, sites, inputs, fisher) if backwards else _forward(model, sites, inputs)
            tokens += counted
    finally:
        model.train(training)
    return tokens


class _LastMomentSeen(Exception):
    """Ends a forward pass that is run for the moments only."""


def _forward(model: nn.Module, sites: list[AttentionSite], inputs: Batch) -> int:
    """Forward as far as the input of the last attention block: what comes after it has no moment to give."""

    def stop(_module, _inputs):
        raise _LastMomentSeen

    trunk = getattr(model, "base_model", model)
    handle = sites[-1].projection("key").register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), _autocast(model), suppress(_LastMomentSeen):
            trunk(**inputs, use_cache=False)
    finally:
        handle.remove()
    return _count(inputs)


def _backward(model: nn.Module, sites, inputs: Batch, fisher: list[_FisherAccumulator]) -> int:
    """Forward and backward of one batch with labels sampled from the model's own distribution."""
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        handles = [h for site, f in zip(sites, fisher, strict=True) for h in _gradient_hooks(site, f)]
        with torch.enable_grad(), _autocast(model):
            logits = getattr(model(**inputs, use_cache=False), "logits", None)
        if logits is None or logits.dim() != 3:
            return _count(inputs)
        logits.backward(_sampled_gradient(logits, _masks(inputs, sites[0].family)["self"]))
        for f in fisher:
            f.count += _count(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)
    return _count(inputs)


@torch.no_grad()
def _sampled_gradient(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of the summed cross-entropy to labels drawn from the model's own distribution: `softmax - one_hot`, in place of a
    second pass over the vocabulary. `[B, T, V]` in, the same out; padding has none."""
    probs = logits.flatten(0, 1).float().softmax(-1)
    generator = torch.Generator(device=probs.device).manual_seed(0)
    draw = torch.rand(len(probs), 1, generator=generator, device=probs.device)
    labels = torch.searchsorted(probs.cumsum(-1), draw).clamp_max(probs.shape[1] - 1)
    probs.scatter_add_(1, labels, torch.full_like(draw, -1.0))
    if mask is not None:
        probs *= mask.flatten()[:, None]
    return probs.view_as(logits).to(logits.dtype)


def _gradient_hooks(site: AttentionSite, fisher: _FisherAccumulator):
    def watch(kind: str):
        def hook(_module, _inputs, output):
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda gradient: fisher.add(kind, site.head_gradient(kind, gradient)))

        return hook

    return [site.projection(kind).register_forward_hook(watch(kind)) for kind in ("key", "value")]


@contextmanager
def _recording(moments: list[_Moments], masks: dict[str, Tensor | None]) -> Iterator[None]:
    """Feed the inputs of the projections into the accumulators."""
    handles = [handle for moment in moments for handle in moment.watch(masks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def needed_names(model: nn.Module, family: Family) -> tuple[str, ...]:
    """What a batch must have. Decoders of models of text make their own inputs from those of the encoder."""
    name = getattr(model, "main_input_name", "input_ids")
    return (name, "decoder_input_ids") if family.seq2seq and name != "input_ids" else (name,)


def input_names(model: nn.Module, family: Family) -> tuple[str, ...]:
    """What of a batch goes into the model."""
    names = (*needed_names(model, family), "attention_mask")
    return (*names, "decoder_input_ids", "decoder_attention_mask") if family.seq2seq else names


def _masks(inputs: Batch, family: Family) -> dict[str, Tensor | None]:
    """Which positions count, by role: those of tokens that are attended to in turn, and those of an encoder."""
    mask = inputs.get("attention_mask")
    if not family.seq2seq:
        return {"self": mask, "encoder": mask}
    decoder = inputs.get("decoder_attention_mask") if "decoder_input_ids" in inputs else mask
    return {"self": decoder, "encoder": mask if family.source_mask else None}


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model knows; None where it has no table of them."""
    with suppress(AttributeError, NotImplementedError):
        return model.get_input_embeddings().num_embeddings
    return None


def _checked(data: Iterable[Batch], names: tuple[str, ...], vocabulary: int | None) -> Iterator[Batch]:
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise ValueError(
            f"`calibration_data` is one {type(data).__name__}, but it must yield batches; pass a list of them or a DataLoader."
        )
    empty = True
    for batch in data:
        missing = [name for name in names if not hasattr(batch, "keys") or name not in batch]
        if missing:
            found = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
            raise ValueError(
                f"a batch of `calibration_data` has no `{missing[0]}` (it has {found}); yield dicts with "
                f"`{'`, `'.join(names)}` (token ids are [batch, length]) and, if padded, `attention_mask`."
            )
        for name in {"input_ids", "decoder_input_ids"} & set(batch.keys()):
            _check_ids(name, batch[name], vocabulary)
        empty = False
        yield batch
    if empty:
        raise ValueError("`calibration_data` yields no batch; pass at least one, or None to use the weights alone.")


def _check_ids(name: str, ids: Any, vocabulary: int | None) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"`{name}` of a batch of `calibration_data` is {found}, but it must be an integer tensor [batch, length] with tokens; "
            'let the tokenizer return tensors (`return_tensors="pt"`), and keep the batch dimension.'
        )
    if vocabulary is None:
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"`{name}` of a batch of `calibration_data` holds token {lowest if lowest < 0 else highest}, but the model knows "
            f"tokens 0 to {vocabulary - 1}; use the tokenizer that belongs to the model."
        )


def _check_weights(model: nn.Module) -> None:
    """All weights, as any of them reaches the moments."""
    for name, tensor in model.named_parameters():
        place = name.rpartition(".")[0] or name
        if tensor.is_meta:
            raise ValueError(f"`{place}` is on the meta device, without weights to compare; load the checkpoint first.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"`{place}` holds NaN or infinite weights, so heads cannot be compared; load an intact checkpoint."
            )


def _autocast(model: nn.Module):
    """bfloat16 matrix products: moments need no more, and they are several times faster."""
    return torch.autocast(_device(model).type, torch.bfloat16)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _count(inputs: Batch) -> int:
    """Tokens of a batch, of the decoder's if there are two kinds; or images."""
    kind = "decoder_" if "decoder_input_ids" in inputs else ""
    mask, ids = inputs.get(f"{kind}attention_mask"), inputs.get(f"{kind}input_ids")
    if ids is None:
        return len(next(iter(inputs.values())))
    return ids.numel() if mask is None else int(mask.sum())
