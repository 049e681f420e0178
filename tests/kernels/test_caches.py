"""Merged models under transformers' other caches, kernel or grouped path against expanded heads on the same cache."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dha_peft  # noqa: F401  plugs the kernel in
from dha_peft.models import build_merged, set_attention_path
from dha_peft.plan import DHAPlan, LayerPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_QUANTO = importlib.util.find_spec("optimum") is not None and importlib.util.find_spec("optimum.quanto") is not None
ON_CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="offloading moves tensors off a CUDA device")
QUANTIZED = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 16}


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    """Ragged maps, 3 key heads and 5 value heads of 16 for 8 query heads, in bf16 (in float32 on a CPU)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()
    layer = LayerPlan(((0, 3), (1, 2, 4), (5, 6, 7)), ((0, 7), (1, 3), (2,), (4, 6), (5,)))
    weights = [
        {"q": a.q_proj.weight, "o": a.o_proj.weight, "k": a.k_proj.weight[:48], "v": a.v_proj.weight[:80]}
        for a in (layer.self_attn for layer in base.model.layers)
    ]
    return build_merged(base, DHAPlan((layer, layer), 16), weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"cache_implementation": "offloaded"}, marks=ON_CUDA),
        pytest.param({"cache_implementation": "offloaded_static", "disable_compile": True}, marks=ON_CUDA),
        pytest.param(
            {"cache_implementation": "quantized", "cache_config": QUANTIZED},
            marks=pytest.mark.skipif(not HAS_QUANTO, reason="needs optimum-quanto"),
        ),
    ],
    ids=["dynamic", "offloaded", "offloaded static", "quantized"],
)
def test_generation_equals_expanded_heads(merged, options):
    ids = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    more = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    found = {}
    try:
        for path in ("auto", "expand"):
            set_attention_path(path)
            found[path] = torch.stack(merged.generate(ids, **more).logits).double()
    finally:
        set_attention_path("auto")
    # The first decode step is the last one whose inputs surely agree: a rounding may turn a greedy choice.
    step = {path: logits[1] for path, logits in found.items()}
    error = (step["auto"] - step["expand"]).norm() / step["expand"].norm()
    assert error < (3e-2 if DEVICE == "cuda" else 1e-4), f"relative error {error:.1e}"
