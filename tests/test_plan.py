"""The plan: what it accepts, what it counts, and that it survives JSON."""

from __future__ import annotations

import json

import pytest

from dha_peft.plan import DHAPlan, LayerPlan, contiguous_groups

LAYER = LayerPlan(((0, 2), (1, 3)), ((0, 1, 2, 3),))


def test_groups_are_put_in_order():
    layer = LayerPlan([[3, 1], [2, 0]], [[1], [3, 2, 0]])
    assert layer.key_groups == ((0, 2), (1, 3))
    assert layer.value_groups == ((0, 2, 3), (1,))
    assert (layer.num_heads, layer.num_key_heads, layer.num_value_heads) == (4, 2, 2)


def test_plans_of_the_same_groups_are_equal_and_hashable():
    same = LayerPlan([[3, 1], [2, 0]], [[3, 2, 1, 0]])
    assert same == LAYER and len({same, LAYER}) == 1


@pytest.mark.parametrize(
    "groups", [[[0, 1], [1, 2]], [[0, 2]], [[1, 2]], [], [[-1, 0]], [[0], [0]]], ids=lambda groups: str(groups)
)
def test_every_head_is_in_exactly_one_group(groups):
    with pytest.raises(ValueError, match="`value_groups` must name every head"):
        LayerPlan([[0, 1, 2]], groups)
    with pytest.raises(ValueError, match="`key_groups` must name every head"):
        LayerPlan(groups, [[0, 1, 2]])


def test_a_group_needs_heads():
    with pytest.raises(ValueError, match="`key_groups` has a group without heads"):
        LayerPlan([[0, 1], []], [[0, 1]])


def test_both_kinds_cover_the_same_heads():
    with pytest.raises(ValueError, match="covers 2 heads but `value_groups` covers 3"):
        LayerPlan([[0, 1]], [[0, 1, 2]])


def test_maps_send_queries_to_the_heads_they_read():
    assert LAYER.key_map() == [0, 1, 0, 1]
    assert LAYER.key_map(8) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert LAYER.value_map(8) == [0] * 8
    with pytest.raises(ValueError, match="`num_query_heads` is 6"):
        LAYER.key_map(6)


def test_counts_and_bytes():
    plan = DHAPlan((LAYER, LayerPlan([[0], [1]], [[0], [1]])), head_dim=16)
    assert (plan.heads_before, plan.heads_after, plan.kept) == (12, 7, 7 / 12)
    assert plan.kv_bytes_per_token() == (12 * 16 * 2, 7 * 16 * 2)
    assert plan.kv_bytes_per_token(1) == (12 * 16, 7 * 16)


def test_bytes_of_a_7b_model():
    quarter = LayerPlan(contiguous_groups(32, 8), contiguous_groups(32, 8))
    plan = DHAPlan((quarter,) * 32, head_dim=128)
    assert plan.kv_bytes_per_token() == (524_288, 131_072)
    assert plan.kept == 0.25


def test_plan_survives_json():
    plan = DHAPlan((LAYER, LayerPlan([[0], [1]], [[0, 1]])), head_dim=16)
    assert DHAPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_incomplete_plans_are_refused():
    data = DHAPlan((LAYER,), head_dim=16).to_dict()
    with pytest.raises(ValueError, match="lacks .'value_groups'."):
        DHAPlan.from_dict({key: data[key] for key in ("head_dim", "key_groups")})
    with pytest.raises(ValueError, match="`key_groups` has 1 layers but `value_groups` has 0"):
        DHAPlan.from_dict({**data, "value_groups": []})


def test_table_names_every_layer_and_the_cache():
    lines = str(DHAPlan((LAYER, LAYER), head_dim=16)).splitlines()
    assert lines[1].split() == ["0", "4", "2", "1"] and lines[2].split()[0] == "1"
    assert lines[-1] == "KV heads 16 -> 6 (37.5%), KV cache 512 -> 192 bytes per token"


@pytest.mark.parametrize("heads,groups", [(8, 2), (8, 8), (8, 1), (12, 5), (7, 3)])
def test_contiguous_groups_are_even(heads, groups):
    parts = contiguous_groups(heads, groups)
    assert [head for part in parts for head in part] == list(range(heads))
    assert len(parts) == groups and max(map(len, parts)) - min(map(len, parts)) <= 1
