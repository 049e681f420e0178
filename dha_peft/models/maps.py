"""Index buffers of one attention layer: which key head and which value head each query head reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadMaps(nn.Module):
    """Maps of one layer, and the index tensors that the attention paths gather with.

    Args:
        key_map: `[H]`, key head of each query head.
        value_map: `[H]`, value head of each query head.
        grouped: whether stock attention repeats heads by itself (`num_key_value_groups`); else it gets all `H`.

    Attributes (`P` pairs are what stock attention sees as its KV heads):
        num_pairs: distinct (key, value) pairs if each serves equally many neighbouring query heads, else `H`.
        pair_key, pair_value: `[P]`, heads that make up each pair.
        key_map, value_map: `[H]`, the maps themselves.
        key_first, value_first: `[Hk]` and `[Hv]`, the first query head that reads each head.
        key_rows, value_rows: `[Hk * n]` and `[Hv * m]`, query heads sorted by the head they read and padded to the
            largest group, so that one batched matmul serves all groups whatever their sizes.
        key_slots, value_slots: `[H]`, where each query head lies in those rows.
        rows_between: `[Hv * m]`, where each value row lies in the key rows.
        queries_in_place, rows_in_place, outputs_in_place: whether `key_rows`, `rows_between` and `value_slots` keep
            everything where it is. values_even: whether no value row is padding.

    Buffers are not saved; `reset_buffers` restores them after loading on the meta device.
    """

    def __init__(self, key_map: list[int], value_map: list[int], grouped: bool = True) -> None:
        super().__init__()
        self.keys, self.values, self.grouped = list(key_map), list(value_map), grouped
        self.num_key_heads, self.num_value_heads = max(key_map) + 1, max(value_map) + 1
        pairs = self._pairs()
        self.num_pairs = len(pairs)
        # Python booleans: known when a graph is traced, so the usual layouts gather nothing.
        self.keys_in_place = [pair[0] for pair in pairs] == list(range(self.num_key_heads))
        self.values_in_place = [pair[1] for pair in pairs] == list(range(self.num_value_heads))
        indices = self._indices(pairs)
        self.queries_in_place = indices["key_rows"] == list(range(len(self.keys)))
        self.rows_in_place = indices["rows_between"] == list(range(len(indices["key_rows"])))
        self.outputs_in_place = indices["value_slots"] == list(range(len(indices["value_rows"])))
        self.values_even = len(indices["value_rows"]) == len(self.values)
        for name, index in indices.items():
            self.register_buffer(name, torch.tensor(index), persistent=False)

    def _pairs(self) -> list[tuple[int, int]]:
        return neighbour_pairs(self.keys, self.values) if self.grouped else list(zip(self.keys, self.values))

    def _indices(self, pairs: list[tuple[int, int]]) -> dict[str, list[int]]:
        key_rows, key_slots = _padded_rows(self.keys)
        value_rows, value_slots = _padded_rows(self.values)
        return {
            "key_map": self.keys,
            "value_map": self.values,
            "key_first": [self.keys.index(head) for head in range(self.num_key_heads)],
            "value_first": [self.values.index(head) for head in range(self.num_value_heads)],
            "pair_key": [pair[0] for pair in pairs],
            "pair_value": [pair[1] for pair in pairs],
            "key_rows": key_rows,
            "key_slots": key_slots,
            "value_rows": value_rows,
            "value_slots": value_slots,
            "rows_between": [key_slots[query] for query in value_rows],
        }

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Write the indices again, on whatever device the buffers are now."""
        for name, index in self._indices(self._pairs()).items():
            getattr(self, name).copy_(torch.tensor(index))

    def expand(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, Hk, S, d]`, `[B, Hv, S, d]` -> `[B, P, S, d]` each; tensors already in that order are returned as is."""
        keys = keys if self.keys_in_place else keys.index_select(1, self.pair_key)
        values = values if self.values_in_place else values.index_select(1, self.pair_value)
        return keys, values

    def extra_repr(self) -> str:
        return f"key_heads={self.num_key_heads}, value_heads={self.num_value_heads}, pairs={self.num_pairs}"


def neighbour_pairs(key_map: list[int], value_map: list[int]) -> list[tuple[int, int]]:
    """Distinct (key, value) pairs in query order if each serves one run of equal length, else one pair per query."""
    per_query = list(zip(key_map, value_map, strict=True))
    pairs = list(dict.fromkeys(per_query))
    run = len(per_query) // len(pairs)
    return pairs if [pair for pair in pairs for _ in range(run)] == per_query else per_query


def neighbour_order(key_map: list[int], value_map: list[int]) -> list[int]:
    """Order of the query heads in which equal pairs are neighbours; the given order if that would gain nothing."""
    per_query = list(zip(key_map, value_map, strict=True))
    order = sorted(range(len(per_query)), key=per_query.__getitem__)
    before = neighbour_pairs(key_map, value_map)
    after = neighbour_pairs([key_map[i] for i in order], [value_map[i] for i in order])
    return order if len(after) < len(before) else list(range(len(per_query)))


def _padded_rows(head_map: list[int]) -> tuple[list[int], list[int]]:
    groups = [[query for query, head in enumerate(head_map) if head == wanted] for wanted in range(max(head_map) + 1)]
    width = max(map(len, groups))
    rows = [query for group in groups for query in group + [group[0]] * (width - len(group))]
    slots = [head * width + groups[head].index(query) for query, head in enumerate(head_map)]
    return rows, slots
