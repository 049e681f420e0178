"""Caches of the study: what a continuation loses, what a cache holds, and one choice of tokens for unequal heads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.study.caches import Variant, continuation, shared_choice
from dha_peft import DHAConfig, DHAPlan, convert
from dha_peft.models.attention import dha_attention


@pytest.mark.filterwarnings("ignore:no `calibration_data`")
def test_a_full_cache_loses_nothing_and_is_as_large_as_the_plan_says():
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()
    model = convert(base, DHAConfig(head_budget=0.4))
    windows = torch.randint(0, 50, (9, 30))
    loss, size = continuation(model, windows, 20, Variant("full"))
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits[:, 20:]
    assert loss == pytest.approx(float(cross_entropy(logits.flatten(0, 1), windows[:, 21:].flatten())), abs=1e-4)
    assert size == DHAPlan.from_dict(model.config.dha_plan).kv_bytes_per_token(4)[1]


def test_one_choice_of_tokens_serves_other_numbers_of_key_and_value_heads():
    @dataclass
    class Press:
        compression_ratio: float

        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return keys[..., 0]

    keys, values = torch.randn(2, 2, 6, 4), torch.randn(2, 5, 6, 4)
    keys[:, :, [1, 4, 5], 0] += 100
    kept = shared_choice(Press)(compression_ratio=0.5).compress(None, None, keys, values, None, {})
    for found, states in zip(kept, (keys, values), strict=True):
        assert torch.equal(found, states[:, :, [1, 4, 5]])


def test_attention_takes_its_arguments_in_transformers_order():
    """kvpress hands the dropout on by its place."""
    shared = list(inspect.signature(sdpa_attention_forward).parameters)[:7]
    assert list(inspect.signature(dha_attention).parameters)[:7] == shared
