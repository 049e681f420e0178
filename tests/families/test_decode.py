"""Decode steps: which families read their few heads un-expanded, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch

from dha_peft import DHAConfig, convert
from dha_peft.models import FAMILIES, core, decode, set_attention_path

from . import test_encoder_decoders as seq2seq
from .cases import CASES, Case, make_base, make_batches, prompts

STEPS = 3


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch):
    """Shapes of the keys that decode steps read without expanding them."""
    seen, grouped = [], decode.grouped_attention
    for module in (decode, core):
        monkeypatch.setattr(module, "grouped_attention", lambda *a: seen.append(a[1].shape[1]) or grouped(*a))
    yield seen
    set_attention_path("auto")


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_reads_the_heads_as_they_are_stored(case: Case, calls: list[int]):
    capped = case.family == "gemma2"  # sdpa does not cap scores
    base = make_base(case, "eager" if capped else case.attn[-1])
    merged = convert(base, DHAConfig(head_budget=0.25, allocation="uniform"), make_batches(1))
    options = {"max_new_tokens": STEPS + 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = {}
    for path in ("auto", "expand"):
        set_attention_path(path)
        answers[path] = merged.generate(**prompts(), **options).logits
        if path == "auto":
            stored = [max(row) + 1 for row in merged.config.key_head_map] * STEPS
            family = FAMILIES[case.family]
            assert calls == (stored if family.dispatch or family.core else [])
    assert len(calls) <= len(merged.config.key_head_map) * STEPS
    torch.testing.assert_close(answers["auto"], answers["expand"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", seq2seq.AUTOS)
def test_decoders_of_encoder_decoders_read_the_heads_as_they_are_stored(family: str, calls: list[int]):
    base = seq2seq.make_base(family, "sdpa")
    merged = convert(base, DHAConfig(head_budget=0.25, allocation="uniform"), [seq2seq.make_batch(family)])
    options = {**seq2seq.GREEDY, "max_new_tokens": STEPS, "output_logits": True, "return_dict_in_generate": True}
    answers = {}
    for path in ("auto", "expand"):
        set_attention_path(path)
        answers[path] = merged.generate(**seq2seq.make_inputs(family), **options).logits
        if path == "auto":
            encoder, *decoder = (max(row) + 1 for row in merged.config.key_head_map)
            assert calls == decoder * STEPS
    assert len(calls) == len(decoder) * STEPS
    torch.testing.assert_close(answers["auto"], answers["expand"], atol=1e-4, rtol=1e-4)
