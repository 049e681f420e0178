"""Alignment against brute force: singular values of the stacked, weighted heads themselves."""

from __future__ import annotations

import pytest
import torch

from dha_peft.fusion.alignment import align_group
from dha_peft.fusion.heads import FrameLayout, HeadMaps
from dha_peft.fusion.moments import head_gram
from dha_peft.fusion.problem import HeadProblem
from dha_peft.fusion.spectra import matrix_sqrt, tail_energy, top_eigh

from .planted import DIM, LAYOUTS, planted_heads, randn, random_gauges, random_psd

SIZE = 40


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def shared_head(heads, members, frame, layout):
    return frame.into.apply(heads[members], layout).sum(0, keepdim=True)


def pair_weights(metric, layout):
    """Mean metric of the two rows of a pair, `[P, H]`."""
    rows = [metric[:, [a, b], [a, b]].mean(1) for a, b in layout.pairs.tolist()]
    return torch.stack(rows) if rows else metric.new_zeros(0, len(metric))


def least_error(heads, moment, metric, layout):
    """Eckart-Young on the weighted heads: one direction per rotary pair, `R` of the free rows."""
    root = torch.linalg.cholesky(moment)
    error = heads.new_zeros(())
    for pair, weight in zip(layout.pairs, pair_weights(metric, layout)):
        rows = torch.complex(heads[:, pair[0]], heads[:, pair[1]]) @ root.to(torch.complex128)
        error += torch.linalg.svdvals(rows * weight.sqrt()[:, None])[1:].square().sum()
    if len(layout.rest):
        weight = torch.linalg.cholesky(metric[:, layout.rest[:, None], layout.rest])
        rows = weight.transpose(1, 2) @ heads[:, layout.rest] @ root
        error += torch.linalg.svdvals(rows.flatten(0, 1))[len(layout.rest) :].square().sum()
    return error


def frame_error(heads, moment, metric, layout, frame):
    """Weighted error of reading every head back from the shared one."""
    members = list(range(len(heads)))
    shared = shared_head(heads, members, frame, layout).expand_as(heads)
    lost = heads - frame.out.apply(shared, layout)
    power = lost @ moment @ lost.transpose(1, 2)
    weights = pair_weights(metric, layout).T
    diagonal = power.diagonal(dim1=1, dim2=2)[:, layout.pairs].sum(-1)
    rest = (slice(None), layout.rest[:, None], layout.rest)
    return (weights * diagonal).sum() + (metric[rest] * power[rest]).sum()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_error_and_frame_reach_the_optimum(layout, count):
    heads, moment, metric = randn(count, DIM, SIZE), random_psd(SIZE, SIZE), random_psd(count, DIM, DIM)
    problem, members = HeadProblem.from_heads(heads, moment, metric, layout), list(range(count))
    best = least_error(heads, moment, metric, layout)
    torch.testing.assert_close(problem.weighted().error(), best)
    frame = align_group(problem, members)
    torch.testing.assert_close(frame_error(heads, moment, metric, layout, frame), best)


def test_no_other_frame_does_better(layout):
    heads, moment, metric = randn(3, DIM, SIZE), random_psd(SIZE, SIZE), random_psd(3, DIM, DIM)
    frame = align_group(HeadProblem.from_heads(heads, moment, metric, layout), [0, 1, 2])
    best = frame_error(heads, moment, metric, layout, frame)
    for maps in (frame.into, frame.out):
        for part in (maps.pair, maps.full):
            change = 1e-3 * torch.randn_like(part)
            part += change
            assert frame_error(heads, moment, metric, layout, frame) >= best * (1 - 1e-12)
            part -= change


def test_duplicates_in_random_frames_are_read_back_exactly(layout):
    heads = planted_heads(((0, 2, 3), (1, 4)), layout, SIZE)
    problem = HeadProblem.from_heads(heads, random_psd(SIZE, SIZE), random_psd(5, DIM, DIM), layout)
    for members in ([0, 2, 3], [1, 4]):
        frame = align_group(problem, members)
        shared = shared_head(heads, members, frame, layout).expand(len(members), -1, -1)
        torch.testing.assert_close(frame.out.apply(shared, layout), heads[members], atol=1e-8, rtol=1e-8)
        assert problem.error(members) < 1e-9


def test_shared_head_has_the_mean_energy_of_its_members(layout):
    heads, moment = randn(4, DIM, SIZE), random_psd(SIZE, SIZE)
    gram = head_gram(heads, moment)
    frame = align_group(HeadProblem.from_heads(heads, moment, random_psd(4, DIM, DIM), layout), [0, 1, 2, 3])
    energy = head_gram(shared_head(heads, [0, 1, 2, 3], frame, layout), moment)[0, 0].trace()
    torch.testing.assert_close(energy, gram.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum() / 4)


def test_error_does_not_depend_on_the_heads_frames():
    layout = LAYOUTS["partial"]
    heads, moment, gauges = randn(3, DIM, SIZE), random_psd(SIZE, SIZE), random_gauges(3, layout, rigid=True)
    metric = torch.eye(DIM, dtype=torch.float64).repeat(3, 1, 1)
    errors = [
        HeadProblem.from_heads(h, moment, metric, layout).weighted().error()
        for h in (heads, gauges.apply(heads, layout))
    ]
    torch.testing.assert_close(*errors)


def test_single_head_gets_identity_maps(layout):
    problem = HeadProblem.from_heads(randn(3, DIM, SIZE), random_psd(SIZE, SIZE), random_psd(3, DIM, DIM), layout)
    frame = align_group(problem, [1])
    heads = randn(1, DIM, SIZE)
    assert torch.equal(frame.into.apply(heads, layout), heads)
    assert torch.equal(frame.out.apply(heads, layout), heads)


def test_deficient_heads_are_read_back(layout):
    """Fewer input directions than rows: the optimum is not unique, but the heads must come back, finite and exact."""
    heads = planted_heads(((0, 1, 2),), layout, SIZE) @ randn(SIZE, 3) @ randn(3, SIZE)
    frame = align_group(
        HeadProblem.from_heads(heads, random_psd(SIZE, SIZE), random_psd(3, DIM, DIM), layout), [0, 1, 2]
    )
    shared = shared_head(heads, [0, 1, 2], frame, layout).expand_as(heads)
    torch.testing.assert_close(frame.out.apply(shared, layout), heads, atol=1e-5, rtol=1e-5)


def test_dead_heads_give_finite_maps(layout):
    heads, metric = randn(2, DIM, SIZE), random_psd(2, DIM, DIM)
    for dead in ([0], [0, 1]):
        heads[dead], metric[dead] = 0, 0
        frame = align_group(HeadProblem.from_heads(heads, random_psd(SIZE, SIZE), metric, layout), [0, 1])
        for maps in (frame.into, frame.out):
            assert maps.pair.isfinite().all() and maps.full.isfinite().all()


def test_transpose_is_the_adjoint(layout):
    maps, a, b = random_gauges(3, layout), randn(3, DIM, 1), randn(3, DIM, 1)
    left, right = (a * maps.apply(b, layout)).sum(1), (maps.transpose().apply(a, layout) * b).sum(1)
    torch.testing.assert_close(left, right)


def test_matrix_sqrt():
    matrix = random_psd(4, DIM, DIM)
    root = matrix_sqrt(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root, root.transpose(1, 2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_cover_every_dimension_once(interleaved):
    layout = FrameLayout.rotary(10, 6, interleaved)
    assert sorted([*layout.pairs.flatten().tolist(), *layout.rest.tolist()]) == list(range(10))
    assert layout.head_dim == 10 and layout.rest.tolist() == [6, 7, 8, 9]
    assert layout.pairs[0].tolist() == ([0, 1] if interleaved else [0, 3])


def test_identity_maps_change_nothing(layout):
    heads = randn(3, DIM, SIZE)
    assert torch.equal(HeadMaps.identity(3, layout, dtype=torch.float64).apply(heads, layout), heads)


@pytest.mark.parametrize("duplicates", [False, True])
def test_top_directions_of_a_large_matrix(duplicates):
    """Against the whole decomposition; the groups of a large layer are decomposed this way."""
    keep, count = 32, 1100 // 32 + 1
    root = randn(count * keep, 1500) * torch.logspace(0, -1.5, 1500)
    if duplicates:
        root = random_psd(count, keep, keep) @ randn(keep, 400)
        root = root.reshape(count * keep, 400)
    matrix = root @ root.T
    values, vectors = top_eigh(matrix, keep)
    exact = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(keep, dtype=torch.float64))
    torch.testing.assert_close(vectors.T @ matrix @ vectors, values.diag(), atol=1e-9 * exact[-1].item(), rtol=1e-7)
    missed = float(exact[-keep:].sum() - values.sum())
    assert missed <= 1e-3 * float(exact[:-keep].clamp_min(0).sum()) + 1e-12 * float(exact.sum())
    torch.testing.assert_close(tail_energy(matrix, keep), matrix.trace() - values.sum())
