"""The fusion operator: the identity leaves every head as it is, equal rows make one head of a group."""

from __future__ import annotations

import pytest
import torch

from dha_peft.fusion.alignment import align_group
from dha_peft.fusion.heads import HeadMaps
from dha_peft.fusion.operator import distances, fuse, fusion_loss, own_share, same_group
from dha_peft.fusion.problem import HeadProblem

from .planted import DIM, LAYOUTS, planted_heads, randn, random_gauges, random_psd

SIZE = 24
GROUPS = ((0, 2, 5), (1, 4), (3,))
TOGETHER = same_group(GROUPS)
IDENTITY = torch.eye(6, dtype=torch.float64)


@pytest.fixture(params=[*LAYOUTS, "linear"])
def frame(request):
    """(into, out, layout); no maps for the paper's linear fusion."""
    if request.param == "linear":
        return None, None, LAYOUTS["half"]
    layout = LAYOUTS[request.param]
    return random_gauges(6, layout), random_gauges(6, layout), layout


def equal_rows():
    """Each row of a group is the same random row."""
    omega = torch.zeros(6, 6, dtype=torch.float64)
    for group in GROUPS:
        rows = torch.tensor(group)
        omega[rows[:, None], rows] = randn(1, len(group)).expand(len(group), -1)
    return omega


def test_same_group():
    expected = [[any(i in g and j in g for g in GROUPS) for j in range(6)] for i in range(6)]
    assert TOGETHER.tolist() == expected


def test_identity_is_exact(frame):
    heads = randn(6, DIM, SIZE)
    assert torch.equal(fuse(heads, IDENTITY, TOGETHER, *frame).heads, heads)
    assert torch.equal(fuse(heads.float(), IDENTITY.float(), TOGETHER, *_single(frame)).heads, heads.float())


def _single(frame):
    into, out, layout = frame
    return (into and into.to(torch.float32), out and out.to(torch.float32), layout)


def test_identity_keeps_all_of_each_head():
    assert torch.equal(own_share(IDENTITY, TOGETHER.double()), torch.ones(6, dtype=torch.float64))


def test_equal_rows_are_collapsed(frame):
    heads, omega = randn(6, DIM, SIZE), equal_rows()
    fused = fuse(heads, omega, TOGETHER, *frame)
    for group in GROUPS[:2]:
        assert own_share(omega, TOGETHER.double())[list(group)].abs().max() < 1e-12
        for head in group:
            torch.testing.assert_close(fused.shared[head], fused.shared[group[0]])
            torch.testing.assert_close(fused.heads[head], fused.collapsed[head])


def test_loss_is_zero_exactly_when_nothing_is_left_to_collapse(frame):
    heads, omega = randn(6, DIM, SIZE), equal_rows()
    omega[3, 3] = 1
    # A group of one has identity maps: its head stays what it is.
    if frame[0] is not None:
        for maps in frame[:2]:
            one = HeadMaps.identity(1, frame[2], dtype=torch.float64)
            maps.pair[3], maps.full[3] = one.pair[0], one.full[0]
    assert float(fusion_loss(*distances(heads, fuse(heads, omega, TOGETHER, *frame)))) < 1e-24
    assert float(fusion_loss(*distances(heads, fuse(heads, IDENTITY, TOGETHER, *frame)))) > 1e-2


def test_operator_follows_its_definition(frame):
    heads, omega = randn(6, DIM, SIZE), randn(6, 6)
    into, out, layout = frame
    framed = heads if into is None else into.apply(heads, layout)
    fused = fuse(heads, omega, TOGETHER, *frame)
    for group in GROUPS:
        for i in group:
            mixed = sum(omega[i, j] * framed[j] for j in group)
            own = omega[i, i] - sum(omega[k, i] for k in group if k != i) / max(len(group) - 1, 1)
            expected = mixed
            if out is not None:
                expected = out.select([i]).apply((mixed - own * framed[i])[None], layout)[0] + own * heads[i]
            torch.testing.assert_close(fused.heads[i], expected)
            mean = sum(omega[k, j] * framed[j] for j in group for k in group) / len(group)
            torch.testing.assert_close(fused.shared[i], mean)


def test_heads_of_other_groups_do_not_matter(frame):
    heads, omega = randn(6, DIM, SIZE), randn(6, 6)
    inside = fuse(heads, omega * TOGETHER, TOGETHER, *frame)
    assert torch.equal(fuse(heads, omega, TOGETHER, *frame).heads, inside.heads)


def test_mean_rows_are_the_closed_form():
    """Rows of 1 / n give the aligned optimum up to the frame's scale: duplicates come back exactly."""
    layout = LAYOUTS["partial"]
    heads = planted_heads(GROUPS, layout, SIZE)
    problem = HeadProblem.from_heads(heads, random_psd(SIZE, SIZE), random_psd(6, DIM, DIM), layout)
    into, out = (HeadMaps.identity(6, layout, dtype=torch.float64) for _ in range(2))
    for group in GROUPS:
        frame = align_group(problem.select(list(group)))
        for target, maps in ((into, frame.into), (out, frame.out)):
            target.pair[list(group)], target.full[list(group)] = maps.pair, maps.full
        # `align_group` sums over members where the operator takes their mean.
        into.pair[list(group)] *= len(group)
        into.full[list(group)] *= len(group)
    omega = TOGETHER / TOGETHER.sum(1, keepdim=True).double()
    torch.testing.assert_close(fuse(heads, omega, TOGETHER, into, out, layout).heads, heads, atol=1e-8, rtol=1e-8)


def test_gradient_reaches_every_entry_inside_a_group(frame):
    omega = IDENTITY.clone().requires_grad_()
    heads = randn(6, DIM, SIZE)
    fusion_loss(*distances(heads, fuse(heads, omega, TOGETHER, *frame))).backward()
    assert omega.grad.isfinite().all()
    groups = TOGETHER.clone()
    groups[3, 3] = False
    assert (omega.grad[groups] != 0).all() and (omega.grad[~TOGETHER] == 0).all()
