"""Losses that make their own gradient equal what autograd makes of their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dha_peft.kernels import HAS_TRITON
from dha_peft.training.losses import HeadLoss, RelativeError, divergence, naive_divergence, relative_error


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(found, expected, inputs):
    """Two losses and their gradients; the upstream gradient is not 1."""
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("next_token", [0.0, 0.3, 1.0])
def test_divergence(next_token, dtype):
    ours, theirs = (drawn(7, 11, seed=seed, dtype=dtype).requires_grad_() for seed in range(2))
    labels = torch.tensor([1, 2, -100, 4, 5, 0, 10])
    logits, wanted = F.log_softmax(ours, -1), F.log_softmax(theirs, -1).detach()
    kl = F.kl_div(logits, wanted, reduction="sum", log_target=True)
    nll = F.nll_loss(logits, labels, ignore_index=-100, reduction="sum")
    expected = (1 - next_token) * kl + next_token * nll
    loss, gradient = divergence(ours.detach(), theirs.detach(), labels, next_token)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, ours)[0])


@pytest.mark.parametrize("keep", [None, torch.tensor([0, 1, 3, 4, 5, 10, 11])], ids=["all", "padded"])
def test_relative_error(keep):
    theirs, ours = drawn(3, 4, 5), drawn(3, 4, 5, seed=1).requires_grad_()
    rows = slice(None) if keep is None else keep
    expected = relative_error(ours.flatten(0, 1)[rows], theirs.flatten(0, 1)[rows])
    assert_same(RelativeError.apply(ours, theirs, keep), expected, ours)


def test_relative_error_of_half_precision_and_of_states_that_do_not_vary():
    theirs, ours = (drawn(2, 300, 8, seed=seed).bfloat16() for seed in range(2))
    found = RelativeError.apply(ours.requires_grad_(), theirs, None)
    torch.testing.assert_close(found, relative_error(ours.flatten(0, 1), theirs.flatten(0, 1)))
    found.backward()
    assert ours.grad.dtype == torch.bfloat16
    assert RelativeError.apply(torch.ones(1, 2, 3), torch.ones(1, 2, 3), None) == 0


@pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton")
@pytest.mark.parametrize("size", [5, 4096, 8192, 32_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("next_token", [0.0, 0.3, 1.0])
def test_the_kernel_equals_the_reference(next_token, dtype, size):
    from dha_peft.training.triton_divergence import divergence_kernel

    logits, wanted = (4 * drawn(37, size, seed=seed).to("cuda", dtype) for seed in range(2))
    labels = torch.arange(37, device="cuda").remainder(size).where(torch.arange(37, device="cuda") % 5 > 0, -100)
    loss, gradient = divergence_kernel(logits, wanted, labels, next_token)
    expected, expected_gradient = naive_divergence(logits.double(), wanted.double(), labels, next_token)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    allowed = 1e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=allowed, atol=1e-6)


def squares(logits, weights):
    """A weighted sum of squares and its gradient."""
    return (logits.square() * weights).sum(), (2 * logits * weights).to(logits.dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_a_head_loss_is_the_same_in_any_chunks(chunk, trained):
    head = nn.Linear(5, 11, dtype=torch.float64).requires_grad_(trained)
    rows, weights = drawn(7, 5).requires_grad_(), drawn(7, 11, seed=1)
    parameters = list(head.parameters()) if trained else []
    found = HeadLoss.apply(head, squares, chunk, (weights,), rows, *parameters)
    assert_same(found, squares(head(rows), weights)[0], [rows, *parameters])


@pytest.mark.parametrize("chunk", [2, 7])
def test_a_head_that_the_model_has_used_before_under_autocast(chunk):
    """Autocast keeps one half-precision copy of the weight for both."""
    head, rows, weights = nn.Linear(5, 11), drawn(7, 5, dtype=torch.float32), drawn(7, 11, seed=1, dtype=torch.float32)
    gradients = []
    for whole in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(rows[:1]).float().sum()
            if whole:
                loss = loss + squares(head(rows), weights)[0]
            else:
                loss = loss + HeadLoss.apply(head, squares, chunk, (weights,), rows, *head.parameters())
        loss.backward()
        gradients.append(head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=3e-2, atol=3e-2)


def test_nothing_is_differentiated_without_need():
    head, rows, weights = nn.Linear(5, 11).requires_grad_(False), torch.ones(7, 5), torch.ones(7, 11)
    found = HeadLoss.apply(head, squares, 3, (weights,), rows)
    assert not found.requires_grad
    torch.testing.assert_close(found, squares(head(rows), weights)[0])
