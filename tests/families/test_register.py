"""Families that users add, and what unknown architectures are told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, MambaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from dha_peft import DHAConfig, convert, get_dha_model, register_family
from dha_peft.models import FAMILIES

from .cases import make_batches, prompts

REPOSITORY = Path(__file__).parents[2]
REMOTE = Path(__file__).with_name("remote_model")


class OddConfig(LlamaConfig):
    model_type = "odd_llama"


class OddModel(LlamaModel):
    config_class = OddConfig

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()


ODD = {"AutoConfig": OddConfig, "AutoModel": OddModel, "AutoModelForCausalLM": OddForCausalLM}


def odd_model() -> OddForCausalLM:
    config = OddConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return OddForCausalLM(config).eval()


@pytest.fixture
def odd_family():
    yield register_family(ODD, layers="blocks")
    FAMILIES.pop("odd_llama")


@torch.no_grad()
def test_a_registered_family_goes_the_whole_road(odd_family, tmp_path):
    base, inputs = odd_model(), prompts()
    wanted = base(**inputs).logits
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), [inputs])
    torch.testing.assert_close(adapted(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    adapted.base_model.tie_groups()
    tied = adapted(**inputs).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, tied, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "DhaOddForCausalLM" and not list(tmp_path.glob("*.py"))
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "dha_odd_llama"
    register_family(ODD, layers="blocks")  # a notebook cell may run twice


def docs_examples(path: Path) -> list[str]:
    """The examples of "A model of remote code" in the docs, for a model in a local folder."""
    section = (REPOSITORY / "docs/families.md").read_text().split("## A model of remote code")[1].split("\n## ")[0]
    return [code.replace("path/or/id", str(path)) for code in re.findall(r"```py\n(.*?)```", section, re.DOTALL)]


@torch.no_grad()
def test_the_example_of_the_docs_runs_on_a_model_of_remote_code(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(shutil.copytree(REMOTE, tmp_path / "code"), trust_remote_code=True),
        trust_remote_code=True,
    )
    base.save_pretrained("tiny")
    assert Path("tiny/modeling_tiny.py").is_file()
    register, convert_and_save, load = docs_examples(tmp_path / "tiny")
    names = {"calibration_batches": make_batches(1)}
    try:
        exec(register + convert_and_save, names)
        adapted = get_dha_model(names["base"], DHAConfig(head_budget=0.5), make_batches(1))
    finally:
        FAMILIES.pop("tiny_remote")
    torch.testing.assert_close(adapted(**prompts()).logits, base.eval()(**prompts()).logits, atol=1e-4, rtol=1e-4)
    assert not list(Path("smaller").glob("*.py"))
    torch.save((prompts()["input_ids"], names["smaller"](prompts()["input_ids"]).logits), "wanted.pt")

    check = "import torch\nids, logits = torch.load('wanted.pt')\n"
    check += "torch.testing.assert_close(smaller(ids).logits, logits)\nassert 'Dha' in type(smaller).__name__"
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "other"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
    }
    command = [sys.executable, "-c", register + load + check]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_unknown_architectures_say_what_was_looked_for():
    with pytest.raises(ValueError, match="`odd_llama`, which is no row.*register_family"):
        get_dha_model(odd_model(), DHAConfig())
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="`mamba`, which is no row"):
        convert(mamba, DHAConfig())
    with pytest.raises(ValueError, match="no `config.model_type`"):
        convert(nn.Linear(2, 2), DHAConfig())


def test_two_kv_heads_become_one():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, initializer_range=0.3, **sizes)
    base, inputs = LlamaForCausalLM(config).eval(), prompts()
    adapted = get_dha_model(base, DHAConfig(head_budget=0.5), [inputs])
    adapted.base_model.tie_groups()
    tied = adapted(**inputs).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, tied, atol=1e-4, rtol=1e-4)
    cache = merged(**inputs).past_key_values
    assert {(layer.keys.shape[1], layer.values.shape[1]) for layer in cache.layers} == {(1, 1)}
    with pytest.raises(ValueError, match="`head_budget` of 0.25"):
        convert(base, DHAConfig(head_budget=0.25))


def test_what_has_nothing_to_fuse_is_refused():
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    cross = GPT2LMHeadModel(GPT2Config(add_cross_attention=True, **sizes))
    with pytest.raises(ValueError, match="cross-attention"):
        convert(cross, DHAConfig())


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt_bigcode", {"multi_query": True}),
        ("falcon", {"multi_query": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    ],
)
def test_multi_query_attention_cannot_shrink(family: str, fields: dict):
    sizes = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    single = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **fields))
    for door in (convert, get_dha_model):
        with pytest.raises(ValueError, match="one key head and one value head already.*no budget can shrink"):
            door(single, DHAConfig())


def test_wrong_rows_say_what_is_wrong():
    with pytest.raises(ValueError, match="no `AutoModel`"):
        register_family({"AutoConfig": OddConfig})
    with pytest.raises(ValueError, match="subclasses of `PreTrainedModel`"):
        register_family({**ODD, "AutoModel": nn.Linear})
    with pytest.raises(ValueError, match="'queries'.*no fields"):
        register_family(ODD, queries="wq")
    with pytest.raises(ValueError, match="family of the table already"):
        register_family({"AutoConfig": LlamaConfig, "AutoModel": LlamaModel})
    try:
        register_family(ODD, layers="stack")
        with pytest.raises(ValueError, match="`stack.*.self_attn`.*has no attribute 'stack'"):
            convert(odd_model(), DHAConfig())
    finally:
        FAMILIES.pop("odd_llama")
