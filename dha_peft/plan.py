"""The plan: which key heads and which value heads of every layer become one.

`DHAPlan` is the one object that every room passes on: the search writes it, the adapter trains along it, the
collapse cuts the weights by it, and the merged model's config carries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerPlan:
    """Groups of one layer. A group is a sorted tuple of the base model's KV head indices; groups are ordered by
    their first member, and every KV head is in exactly one group of each kind."""

    key_groups: Groups
    value_groups: Groups

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

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> tuple[int, int]:
        """Bytes of KV cache per token, (before, after), for elements of `bytes_per_value` bytes."""
        unit = self.head_dim * bytes_per_value
        return self.heads_before * unit, self.heads_after * unit

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and ints, ready for JSON."""
        return {
            "head_dim": self.head_dim,
            "key_groups": [[list(g) for g in layer.key_groups] for layer in self.layers],
            "value_groups": [[list(g) for g in layer.value_groups] for layer in self.layers],
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
        pairs = zip(data["key_groups"], data["value_groups"], strict=True)
        return cls(tuple(LayerPlan(k, v) for k, v in pairs), int(data["head_dim"]))

    def table(self, bytes_per_value: int = 2) -> str:
        """Per layer: heads before, key heads and value heads after; then the KV cache per token."""
        rows = ["layer  heads  key heads  value heads"]
        for index, layer in enumerate(self.layers):
            rows.append(f"{index:5d}  {layer.num_heads:5d}  {layer.num_key_heads:9d}  {layer.num_value_heads:11d}")
        before, after = self.kv_bytes_per_token(bytes_per_value)
        rows.append(
            f"KV heads {self.heads_before} -> {self.heads_after} ({self.kept:.1%}), "
            f"KV cache {before:,} -> {after:,} bytes per token"
        )
        return "\n".join(rows)

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
