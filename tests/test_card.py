"""The card that every save leaves: its lineage, how it says to load, and that it never replaces a person's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from dha_peft import DHAConfig, convert
from dha_peft.card import write_card

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """A tiny base, saved with a card that names its licence."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, initializer_range=0.3)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_bare_save_writes_the_card(base_folder, tmp_path):
    small = convert(LlamaForCausalLM.from_pretrained(base_folder), DHAConfig(head_budget=0.5))
    small.save_pretrained(tmp_path / "small")
    text = (tmp_path / "small" / "README.md").read_text()
    assert front(tmp_path / "small") == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "tiny-base",
        "base_model_relation": "finetune", "tags": ["dha", "peft", "kv-cache"], "license": "mit",
    }  # fmt: skip
    assert "256 -> 128 bytes per token" in text and "trust_remote_code=True" in text and "bibtex" in text
    # The base is remembered by the config alone, in another process and under another path.
    again = type(small).from_pretrained(tmp_path / "small")
    again.save_pretrained(tmp_path / "again")
    assert front(tmp_path / "again")["base_model"] == "tiny-base"
    assert str(base_folder.parent) not in (tmp_path / "again" / "config.json").read_text()
    again.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker" / "README.md").exists()


def test_other_tasks_are_named_as_what_they_are(base_folder, tmp_path):
    base = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(base_folder, num_labels=3, pad_token_id=0)
    )
    convert(base, DHAConfig(head_budget=0.5)).save_pretrained(tmp_path)
    assert front(tmp_path)["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in (tmp_path / "README.md").read_text()


def test_a_person_s_words_stay(base_folder, tmp_path):
    small = convert(LlamaForCausalLM.from_pretrained(base_folder), DHAConfig(head_budget=0.5))
    card = tmp_path / "README.md"
    card.write_text("mine")
    small.save_pretrained(tmp_path)
    facts = {"base": str(base_folder), "plan": small.config.dha_plan}
    assert card.read_text() == "mine" and not write_card(tmp_path, facts)
    card.unlink()
    small.save_pretrained(tmp_path)
    assert write_card(tmp_path, facts | {"losses": {"base": 1.0}}) and "| base | 1.0000 |" in card.read_text()
    # A new front matter alone is no edit of the text, which new figures may replace.
    card.write_text(card.read_text().replace("license: mit", "license: apache-2.0"))
    assert write_card(tmp_path, facts)
    card.write_text(card.read_text().replace("## Plan", "## My plan"))
    assert not write_card(tmp_path, facts) and "## My plan" in card.read_text()


def test_an_adapter_on_the_merged_model_is_saved_without_a_card(base_folder, tmp_path):
    from peft import LoraConfig

    small = convert(LlamaForCausalLM.from_pretrained(base_folder), DHAConfig(head_budget=0.5))
    small.add_adapter(LoraConfig(target_modules=["q_proj"]))
    small.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "README.md").exists()
