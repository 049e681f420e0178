"""A trained model that has fewer KV heads than query heads already is converted further, and alignment pays."""

from __future__ import annotations

import torch
from shared_data import shared_data
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert
from dha_peft.texts import text_tokens, token_batches


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Nats per token over rows of `ids`."""
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def test_four_to_two_kv_heads_costs_a_third_of_mean_pooling():
    folder, text = shared_data("models/stories260K"), shared_data("text/tinystories_heldout.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (base.config.num_attention_heads, base.config.num_key_value_heads) == (8, 4)
    tokens = text_tokens(tokenizer, [text], 24576)
    batches = token_batches(tokenizer, [text], tokens=8192, length=256)
    held_out = tokens[8192:].reshape(-1, 256)

    uniform = {"head_budget": 0.5, "allocation": "uniform"}
    aligned = convert(base, DHAConfig(**uniform), batches)
    pooled = convert(base, DHAConfig(fusion="linear", grouping="contiguous", **uniform), batches)
    plan = DHAPlan.from_dict(aligned.config.dha_plan)
    assert {(layer.num_heads, layer.num_key_heads, layer.num_value_heads) for layer in plan.layers} == {(4, 2, 2)}
    assert all(len(row) == 8 and max(row) == 1 for row in aligned.config.key_head_map)
    start, ours, mean = (mean_loss(model, held_out) for model in (base, aligned, pooled))
    print(f"loss {start:.3f}, aligned {ours:.3f} (+{ours - start:.3f}), mean pooling {mean:.3f} (+{mean - start:.3f})")
    assert mean - start >= 3 * (ours - start)
