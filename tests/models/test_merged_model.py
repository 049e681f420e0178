"""The merged model equals a base whose heads are equal within each group, through every road of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from dha_peft.models import MODELS, build_merged
from dha_peft.plan import DHAPlan, LayerPlan, contiguous_groups

from .conftest import HEADS, RAGGED, first_heads, make_base, singletons

FAMILIES = ["llama", "mistral", "qwen2"]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_singleton_groups_are_the_base_exactly(model_type, kv_heads, prompts):
    base = make_base(model_type, num_key_value_heads=kv_heads)
    plan = singletons(kv_heads)
    merged = build_merged(base, plan, first_heads(base, plan))
    ids, mask = prompts
    assert torch.equal(merged(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tied_heads_give_the_same_logits_and_tokens(model_type, attention, make_pair, prompts):
    base, merged = make_pair(model_type, attn_implementation=attention)
    ids, mask = prompts
    expected = base(ids, attention_mask=mask, output_hidden_states=True)
    got = merged(ids, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
        options |= {"attention_mask": mask[rows], "max_new_tokens": 10, "do_sample": False}
        assert torch.equal(merged.generate(ids[rows], **options), base.generate(ids[rows], **options))


def test_gqa_base_is_grouped_over_its_kv_heads(make_pair, prompts):
    coupled = LayerPlan(((0, 2), (1, 3)), ((0, 2), (1, 3)))
    plan = DHAPlan((coupled, LayerPlan(((0, 1, 2), (3,)), contiguous_groups(4, 3))), 8)
    base, merged = make_pair("qwen2", plan=plan, num_key_value_heads=4)
    ids, mask = prompts
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(merged.generate(ids, **options), base.generate(ids, **options))
    # Equal pairs become neighbours, so stock attention sees two KV heads in the first layer.
    assert [layer.self_attn.dha_maps.num_pairs for layer in merged.model.layers] == [2, 8]


def test_caches_hold_only_the_fused_heads(make_pair, prompts):
    _, merged = make_pair()
    ids, _ = prompts
    with torch.no_grad():
        for cache, length in (
            (DynamicCache(config=merged.config), 9),
            (StaticCache(merged.config, max_cache_len=16), 16),
        ):
            merged(ids, past_key_values=cache)
            shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
            assert shapes == [((2, hk, length, 8), (2, hv, length, 8)) for hk, hv in ((4, 3), (4, 4))]


def test_window_and_static_caches_give_the_same_tokens(make_pair, prompts):
    base, merged = make_pair("mistral", sliding_window=5)
    ids, mask = prompts
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = base.generate(ids, **options)
    assert torch.equal(merged.generate(ids, **options), expected)
    static = merged.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


def test_static_decode_compiles_as_one_graph(make_pair, prompts):
    base, merged = make_pair()
    ids, mask = prompts
    step = torch.compile(merged.forward, fullgraph=True)
    cache = StaticCache(merged.config, max_cache_len=16)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = merged(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        for _ in range(2):
            token, position = logits[:, -1:].argmax(-1), position[:, -1:] + 1
            ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            logits = step(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
            everywhere = (mask.cumsum(1) - 1).clamp(min=0)
            expected = base(ids, attention_mask=mask, position_ids=everywhere).logits[:, -1:]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_generate_compiles_with_a_static_cache(make_pair, prompts):
    base, merged = make_pair("qwen2")
    ids, mask = prompts
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode="default")
    compiled._compile_all_devices = True  # transformers compiles by itself on accelerators only
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    static = merged.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, base.generate(ids, **options))
    assert merged._compiled_call is not None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_with_a_pool_of_the_fused_size(attention, make_pair):
    base, merged = make_pair(attn_implementation=attention)
    assert merged.config.num_key_value_heads == 4
    prompts = [[5, 9, 33], [7, 8, 9, 10, 11, 12, 13]]
    greedy = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    answers = merged.generate_batch(inputs=prompts, generation_config=greedy, continuous_batching_config=paged)
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        expected = base.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :]
        assert answer.generated_tokens == expected.tolist()


def test_training_step_with_gradient_checkpointing(make_pair, prompts):
    _, merged = make_pair("qwen2")
    ids, _ = prompts
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            merged.gradient_checkpointing_enable()
        merged.zero_grad()
        merged.train()(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in merged.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])
    assert all(grad.abs().sum() > 0 for name, grad in grads[0].items() if "k_proj.bias" not in name)


@pytest.mark.parametrize("auto", [auto for auto in MODELS["dha_llama"] if auto != "AutoModelForCausalLM"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_bare_trunk_and_task_heads(model_type, auto, make_pair, prompts):
    base, merged = make_pair(model_type, auto, num_labels=3)
    ids, mask = prompts
    assert type(merged) is MODELS[f"dha_{model_type}"][auto]
    for got, expected in zip(merged(ids, attention_mask=mask).to_tuple(), base(ids, attention_mask=mask).to_tuple()):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_dtype_generation_config_tying_and_sharing_follow_the_base():
    base = make_base("llama", tie_word_embeddings=True).to(torch.bfloat16)
    base.generation_config.max_length = 33
    weights = [{name: tensor.float() for name, tensor in layer.items()} for layer in first_heads(base, RAGGED)]
    merged = build_merged(base, RAGGED, weights)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert merged.generation_config.max_length == 33
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    assert build_merged(base, RAGGED, weights, share=False).lm_head.weight.data_ptr() != base.lm_head.weight.data_ptr()


def test_random_init_from_config_is_usable(make_pair, prompts):
    _, merged = make_pair()
    config = merged.config
    fresh = MODELS["dha_llama"]["AutoModelForCausalLM"](config)
    assert fresh(prompts[0]).logits.isfinite().all()
    assert 0.2 < fresh.model.layers[0].self_attn.k_proj.weight.std() < 0.4  # the family's init, not torch's


def test_errors_say_what_to_do(make_pair):
    base, merged = make_pair()
    weights = first_heads(base, RAGGED)
    with pytest.raises(ValueError, match="already a merged"):
        build_merged(merged, RAGGED, weights)
    with pytest.raises(ValueError, match="supported types are .*llama, .*mistral.*register_family"):
        build_merged(make_base("helium"), RAGGED, weights)
    with pytest.raises(ValueError, match="groups 8 heads, but the base has 4"):
        build_merged(make_base("llama", num_key_value_heads=4), RAGGED, weights)
    with pytest.raises(ValueError, match="`k` of layer 0 has shape"):
        build_merged(base, singletons(HEADS), weights)
    with pytest.raises(ValueError, match="key_head_map.*has 1 layers"):
        type(merged.config)(num_hidden_layers=2, key_head_map=[[0, 1]])
