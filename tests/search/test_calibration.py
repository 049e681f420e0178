"""The calibration run: it stops where the last moment is known, and its gradients are those of sampled labels."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import make_base, make_batches, state

from dha_peft.attention import find_attention
from dha_peft.search import collect_statistics
from dha_peft.search.calibration import _sampled_gradient


def test_moments_are_those_of_a_whole_forward():
    base, batches = make_base("qwen2"), make_batches(3)
    sites = find_attention(base)
    statistics = collect_statistics(base, sites, batches, gradient_tokens=0)
    assert not statistics.in_nats and statistics.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    for index, site in enumerate(sites):
        rows = []
        handle = site.projection("key").register_forward_pre_hook(lambda _m, x, rows=rows: rows.append(x[0]))
        for batch in batches:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                base(**batch)
            rows[-1] = rows[-1][batch["attention_mask"].bool()].float()
        handle.remove()
        rows = torch.cat([torch.cat(rows), torch.ones(statistics.tokens, 1)], dim=1)
        torch.testing.assert_close(statistics.moments[index], rows.T @ rows / len(rows), atol=1e-4, rtol=1e-4)


def test_nothing_runs_after_the_last_moment():
    base, seen = make_base(), []
    sites = find_attention(base)
    base.model.layers[-1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    collect_statistics(base, sites, make_batches(), gradient_tokens=0)
    assert not seen
    collect_statistics(base, sites, make_batches())
    assert seen
    assert not sites[-1].projection("key")._forward_pre_hooks


def test_an_error_of_the_model_is_not_swallowed_and_leaves_no_hook():
    base = make_base()
    before, sites = state(base), find_attention(base)

    def broken(*_):
        raise RuntimeError("broken layer")

    base.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        collect_statistics(base, sites, make_batches(), gradient_tokens=0)
    assert not sites[-1].projection("key")._forward_pre_hooks and state(base).keys() == before.keys()


def test_the_gradient_is_that_of_cross_entropy_to_sampled_labels():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    gradient = _sampled_gradient(logits, mask)
    labels = (logits.detach().softmax(-1) - gradient).argmax(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (loss * mask.flatten()).sum().backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_labels_are_drawn_from_the_models_distribution():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1, 20_000, 3)
    labels = (logits.softmax(-1) - _sampled_gradient(logits, None)).argmax(-1)
    shares = torch.bincount(labels[0], minlength=3) / labels.numel()
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.02, rtol=0)
