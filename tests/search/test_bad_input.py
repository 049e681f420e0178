"""Every kind of bad input is one clear error before work starts."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import HEADS, LAYERS, make_base, make_batches
from torch import nn

from dha_peft import DHAConfig, analyse, convert, get_dha_model


@pytest.mark.parametrize("field", ["head_budget", "key_budget", "value_budget"])
@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan"), "half"])
def test_budget_outside_0_to_1(field, budget):
    with pytest.raises(ValueError, match=f"`{field}` is"):
        DHAConfig(**{field: budget})


@pytest.mark.parametrize("door", [convert, get_dha_model])
@pytest.mark.parametrize("field", ["head_budget", "key_budget", "value_budget"])
def test_budget_below_one_head_per_layer(field, door):
    with pytest.raises(ValueError, match=f"`{field}` of 0.05 keeps .* fewer than one per layer"):
        door(make_base(), DHAConfig(**{field: 0.05}), make_batches())


def test_too_small_a_budget_is_found_before_the_calibration_runs():
    def batches():
        raise AssertionError("the calibration started")
        yield

    with pytest.raises(ValueError, match="`head_budget` of 0.05"):
        get_dha_model(make_base(), DHAConfig(head_budget=0.05), batches())


@pytest.mark.parametrize(
    ("field", "value"), [("min_heads", 0), ("damping", -1.0), ("damping", float("nan")), ("key_weight", 0)]
)
def test_numbers_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}.*choose"):
        DHAConfig(**{field: value})


@pytest.mark.parametrize("door", [convert, get_dha_model])
def test_a_quantized_base_is_refused_before_the_calibration_runs(door):
    def batches():
        raise AssertionError("the calibration started")
        yield

    base = make_base()
    base.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantized.*`dequantize"):
        door(base, DHAConfig(), batches())


def test_learned_groups_cannot_be_merged_before_they_are_learned():
    model = get_dha_model(make_base(), DHAConfig(grouping="learned"))
    with pytest.raises(ValueError, match="no groups before its search has run"):
        model.merge_and_unload()
    assert model.base_model.plan().heads_after == 2 * LAYERS  # still an adapter: nothing was taken apart


@pytest.mark.parametrize("field", ["fusion", "grouping", "allocation"])
def test_unknown_choices(field):
    with pytest.raises(ValueError, match=f"`{field}` is 'nonsense'; choose one of"):
        DHAConfig(**{field: "nonsense"})


@pytest.mark.parametrize("door", [convert, get_dha_model])
def test_latent_attention_and_unsupported_families(door):
    mla = make_base(
        "deepseek_v3",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=LAYERS,
    )
    with pytest.raises(ValueError, match="deepseek_v3.*multi-head latent attention"):
        door(mla, DHAConfig(), make_batches())
    with pytest.raises(ValueError, match="`Linear` has no `config.model_type`"):
        door(nn.Linear(2, 2), DHAConfig(), make_batches())


@pytest.mark.parametrize("door", [convert, get_dha_model])
def test_a_module_without_key_or_value_projection(door):
    base = make_base()
    del base.model.layers[1].self_attn.v_proj
    with pytest.raises(ValueError, match="`model.layers.1.self_attn` has no `v_proj`"):
        door(base, DHAConfig(), make_batches())


@pytest.mark.parametrize("door", [convert, get_dha_model])
def test_an_already_converted_model(door):
    small = convert(make_base(), DHAConfig(head_budget=0.5), make_batches())
    with pytest.raises(ValueError, match="`dha_llama` is already a merged DHA model"):
        door(small, DHAConfig(), make_batches())


@pytest.mark.parametrize("door", [convert, get_dha_model])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"attention_mask": torch.ones(1, 4)}], "has no `input_ids`"),
        ([torch.ones(1, 4, dtype=torch.long)], "has no `input_ids`"),
        ([], "yields no batch"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "is one dict"),
        (5, "is one int"),
        ([{"input_ids": [[1, 2]]}], "is list"),
        ([{"input_ids": torch.ones(4, dtype=torch.long)}], r"is torch.int64 \[4\]"),
        ([{"input_ids": torch.rand(1, 4)}], r"is torch.float32 \[1, 4\]"),
        ([{"input_ids": torch.tensor([[1, 64]])}], "holds token 64, but the model knows tokens 0 to 63"),
        ([{"input_ids": torch.tensor([[1, -100]])}], "holds token -100"),
    ],
)
def test_unusable_calibration_batches(door, batches, message):
    base = make_base().train()
    with pytest.raises(ValueError, match=f"(?s)(?=.*calibration_data).*{message}"):
        door(base, DHAConfig(), batches)
    assert base.training and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_weights_that_are_not_finite(kind, value):
    base = make_base("qwen2")
    getattr(base.model.layers[2].self_attn.k_proj, kind).data.view(-1)[3] = value
    for door, data in ((convert, make_batches()), (get_dha_model, None)):
        with pytest.raises(ValueError, match="`model.layers.2.self_attn.k_proj` holds NaN or infinite"):
            door(base, DHAConfig(), data)


def test_weights_that_are_not_finite_or_not_there_anywhere():
    base = make_base()
    base.model.embed_tokens.weight.data[5, 3] = float("nan")
    with pytest.raises(ValueError, match="`model.embed_tokens` holds NaN"):
        convert(base, DHAConfig(), make_batches())
    with pytest.raises(ValueError, match="on the meta device"):
        convert(make_base().to("meta"), DHAConfig(), make_batches())


def test_a_model_with_adapters():
    model = get_dha_model(make_base(), DHAConfig(head_budget=0.5), make_batches())
    for carrier in (model, model.base_model.model):
        with pytest.raises(ValueError, match="carries adapters already; call `add_adapter`"):
            get_dha_model(carrier, DHAConfig(), make_batches())


@pytest.mark.parametrize("door", [convert, get_dha_model])
def test_an_analysis_of_another_model(door):
    analysis = analyse(make_base(), make_batches())
    for other in (make_base("qwen2"), make_base(num_hidden_layers=2), make_base(initializer_range=0.2)):
        with pytest.raises(ValueError, match="`analysis` was made on another model"):
            door(other, DHAConfig(), analysis=analysis)
    door(make_base(), DHAConfig(), analysis=analysis)  # a copy of the same weights


def test_learned_grouping_has_no_one_shot_conversion():
    with pytest.raises(ValueError, match='`grouping="learned"` needs training'):
        convert(make_base(), DHAConfig(grouping="learned"), make_batches())


def test_a_plan_for_another_base_shape():
    plan = convert(make_base(num_key_value_heads=4), DHAConfig(head_budget=0.5), make_batches()).config.dha_plan
    for door in (convert, get_dha_model):
        with pytest.raises(ValueError, match=f"layers of 4 heads .* this model has {LAYERS} layers of {HEADS} heads"):
            door(make_base(), DHAConfig(plan=plan), make_batches())
