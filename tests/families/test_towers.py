"""Models of text and images: the language model inside is converted alone, and serves in its place."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from dha_peft import DHAConfig, DHAPlan, convert, get_dha_model

from .cases import HEAD_DIM, HEADS, LAYERS, VOCAB, WINDOW, make_batches, prompts

TEXT = {
    "vocab_size": VOCAB, "hidden_size": HEADS * HEAD_DIM, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "head_dim": HEAD_DIM, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SEEING = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
TOWERS = {
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "projection_dim": 32}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 16}),
    "gemma3": ({"model_type": "gemma3_text", **WINDOW}, {"model_type": "siglip_vision_model"}),
}


def make_towers(family: str) -> PreTrainedModel:
    text, seeing = ({**sizes, **own} for sizes, own in zip((TEXT, {**SEEING, "image_size": 16}), TOWERS[family]))
    config = AutoConfig.for_model(family, text_config=text, vision_config=seeing, image_token_index=VOCAB - 1)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("family", TOWERS)
def test_the_whole_is_refused_with_the_way_out(family: str):
    text = TOWERS[family][0]["model_type"]
    for door in (convert, get_dha_model):
        with pytest.raises(
            ValueError, match=f"`{family}` is made of several.*`{text}`, most often at `model.model.lang"
        ):
            door(make_towers(family), DHAConfig())


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_a_converted_language_model_serves_in_its_place(family: str, tmp_path):
    model = make_towers(family)
    small = convert(model.model.language_model, DHAConfig(head_budget=0.5), make_batches(1))
    model.model.language_model, model.config.text_config = small, small.config
    answer = model.generate(**prompts(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    plan = DHAPlan.from_dict(small.config.dha_plan)
    counts = [(layer.keys.shape[1], layer.values.shape[1]) for layer in answer.past_key_values.layers]
    assert counts == [(layer.num_key_heads, layer.num_value_heads) for layer in plan.layers]
    wanted = model.lm_head(small(**prompts()).last_hidden_state)
    torch.testing.assert_close(model(**prompts()).logits, wanted)

    if family == "gemma3":  # its config names one class for its text model, so the whole cannot be loaded again
        return
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again.model.language_model) is type(small)
    torch.testing.assert_close(again(**prompts()).logits, wanted, atol=1e-5, rtol=1e-5)
