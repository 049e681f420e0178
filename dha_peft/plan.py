"""The plan: which key heads and which value heads of every layer become one.

`DHAPlan` is the one object that every room passes on: the search writes it, the adapter trains along it, the
collapse cuts the weights by it, and the merged model's config carries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerPlan:
    """Groups of one layer, or rather of one attention block. A group is a sorted tuple of the base model's KV head indices;
    groups are ordered by their first member, and every KV head is in exactly one group of each kind.

    `name` is the block's path from the trunk, such as "decoder.layers.0.encoder_attn", or empty. `role` tells what is cached:
    "self" (heads of every token), "cross" (heads of every source token) or "encoder" (nothing). Plans that differ in these
    labels alone are equal.
    """

    key_groups: Groups
    value_groups: Groups
    name: str = field(default="", compare=False)
    role: str = field(default="self", compare=False)

    def __post_init__(self) -> None:
        for kind in ("key_groups", "value_groups"):
            groups = _canonical(getattr(self, kind))
            members = sorted(head for group in groups for head in group)
            if not all(groups):
                raise ValueError(
                    f"`{kind}` has a group without heads; leave it out, or give it a head of another group."
                )
            if not groups or members != list(range(len(members))):
                raise ValueError(
                    f"`{kind}` must name every head from 0 on exactly once, but it names {members}; "
                    "list each head in one group."
                )
            object.__setattr__(self, kind, groups)
        if self.num_heads != sum(map(len, self.value_groups)):
            raise ValueError(
                f"`key_groups` covers {self.num_heads} heads but `value_groups` covers "
                f"{sum(map(len, self.value_groups))}; both must cover the layer's KV heads."
            )

    @property
    def num_heads(self) -> int:
        """KV heads of the base layer."""
        return sum(map(len, self.key_groups))

    @property
    def num_key_heads(self) -> int:
        return len(self.key_groups)

    @property
    def num_value_heads(self) -> int:
        return len(self.value_groups)

    def key_map(self, num_query_heads: int | None = None) -> list[int]:
        """Key head that each query head reads. `num_query_heads` is a multiple of the base's KV heads (GQA)."""
        return _head_map(self.key_groups, self.num_heads, num_query_heads)

    def value_map(self, num_query_heads: int | None = None) -> list[int]:
        """Value head that each query head reads."""
        return _head_map(self.value_groups, self.num_heads, num_query_heads)


@dataclass(frozen=True)
class DHAPlan:
    """Groups of every layer of a model, in layer order, and the sizes that turn heads into bytes."""

    layers: tuple[LayerPlan, ...]
    head_dim: int

    @property
    def heads_before(self) -> int:
        """Key heads plus value heads of the base, over all layers."""
        return sum(2 * layer.num_heads for layer in self.layers)

    @property
    def heads_after(self) -> int:
        return sum(layer.num_key_heads + layer.num_value_heads for layer in self.layers)

    @property
    def kept(self) -> float:
        """Share of the base's KV heads that is kept, in (0, 1]."""
        return self.heads_after / self.heads_before

    def kv_bytes_per_token(self, bytes_per_value: int = 2, role: str = "self") -> tuple[int, int]:
        """Bytes of KV cache per token, (before, after), for elements of `bytes_per_value` bytes; with `role="cross"` per
        token of an encoder's output."""
        cached, unit = [layer for layer in self.layers if layer.role == role], self.head_dim * bytes_per_value
        before = sum(2 * layer.num_heads for layer in cached)
        return before * unit, sum(layer.num_key_heads + layer.num_value_heads for layer in cached) * unit

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and ints, ready for JSON."""
        labels = {"names": [layer.name for layer in self.layers], "roles": [layer.role for layer in self.layers]}
        return {
            "head_dim": self.head_dim,
            "key_groups": [[list(g) for g in layer.key_groups] for layer in self.layers],
            "value_groups": [[list(g) for g in layer.value_groups] for layer in self.layers],
            **(labels if any(labels["names"]) else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DHAPlan:
        missing = {"head_dim", "key_groups", "value_groups"} - set(data)
        if missing:
            raise ValueError(f"the plan lacks {sorted(missing)}; save plans with `DHAPlan.to_dict()`.")
        key_layers, value_layers = len(data["key_groups"]), len(data["value_groups"])
        if key_layers != value_layers:
            raise ValueError(
                f"`key_groups` has {key_layers} layers but `value_groups` has {value_layers}; both need one entry per layer."
            )
        names, roles = data.get("names", [""] * key_layers), data.get("roles", ["self"] * key_layers)
        if len(names) != key_layers or len(roles) != key_layers:
            raise ValueError(
                f"the plan has {key_layers} layers but {len(names)} `names` and {len(roles)} `roles`; give one each, or none."
            )
        rows = zip(data["key_groups"], data["value_groups"], names, roles, strict=True)
        return cls(tuple(LayerPlan(*row) for row in rows), int(data["head_dim"]))

    def table(self, bytes_per_value: int = 2) -> str:
        """Per layer: heads before, key heads and value heads after; then the KV cache per token."""
        labels = self._labels()
        width = max(5, *map(len, labels))
        rows = [f"{'layer':<{width}}  heads  key heads  value heads"]
        for label, layer in zip(labels, self.layers, strict=True):
            rows.append(
                f"{label:>{width}}  {layer.num_heads:5d}  {layer.num_key_heads:9d}  {layer.num_value_heads:11d}"
            )
        rows.append(f"KV heads {self.heads_before} -> {self.heads_after} ({self.kept:.1%})")
        for role, token in (("self", "token"), ("cross", "source token")):
            before, after = self.kv_bytes_per_token(bytes_per_value, role)
            rows[-1] += f", KV cache {before:,} -> {after:,} bytes per {token}" if before else ""
        return "\n".join(rows)

    def _labels(self) -> list[str]:
        """Numbers where every layer has one block, else names."""
        several = len({layer.role for layer in self.layers}) > 1
        return [layer.name if several else str(index) for index, layer in enumerate(self.layers)]

    def __str__(self) -> str:
        return self.table()


def contiguous_groups(num_heads: int, num_groups: int) -> Groups:
    """Neighbouring heads together, as GQA does; sizes differ by at most one."""
    edges = [round(i * num_heads / num_groups) for i in range(num_groups + 1)]
    return tuple(tuple(range(a, b)) for a, b in zip(edges, edges[1:], strict=False))


def _canonical(groups: Iterable[Sequence[int]]) -> Groups:
    return tuple(sorted(tuple(sorted(int(h) for h in group)) for group in groups))


def _head_map(groups: Groups, num_heads: int, num_query_heads: int | None) -> list[int]:
    queries = num_heads if num_query_heads is None else num_query_heads
    if queries % num_heads:
        raise ValueError(f"`num_query_heads` is {queries}, which {num_heads} KV heads do not divide.")
    owner = {head: index for index, group in enumerate(groups) for head in group}
    return [owner[query * num_heads // queries] for query in range(queries)]
