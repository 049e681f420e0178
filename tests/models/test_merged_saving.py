"""Saved folders load with and without the package, and re-saving from either keeps both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dha_peft.models
from dha_peft.models import MODELS

# Runs without the package: `sys.modules["dha_peft"] = None` makes every import of it fail.
WITHOUT_PACKAGE = """
import sys
sys.modules["dha_peft"] = None
import torch, transformers
source, auto, target = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = torch.load(source + "/ids.pt")
outputs = model(ids)
torch.save(outputs.last_hidden_state if auto == "AutoModel" else outputs.to_tuple()[0], target + ".pt")
if auto == "AutoModelForCausalLM":
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    static = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, static)
model.save_pretrained(target)
"""


def load_without_package(source: Path, auto: str, target: Path, cache: Path) -> torch.Tensor:
    """First output of the model that a process without the package loads; it saves the model again to `target`."""
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(source), auto, str(target)]
    environment = {
        "HF_MODULES_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(command, cwd=cache.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{target}.pt")


@pytest.mark.parametrize(
    "model_type, auto", [("llama", "AutoModelForCausalLM"), ("qwen2", "AutoModelForSequenceClassification")]
)
def test_remote_code_without_the_package_and_back(model_type, auto, make_pair, prompts, tmp_path):
    _, merged = make_pair(model_type, auto, tie_word_embeddings=model_type == "qwen2", num_labels=3)
    ids = prompts[0][:1]
    expected = merged(ids).to_tuple()[0]
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    merged.save_pretrained(first)
    torch.save(ids, first / "ids.pt")
    torch.testing.assert_close(load_without_package(first, auto, second, tmp_path / "cache"), expected)
    # What the process without the package saved: the package reads it, without trust, and saves it once more.
    again = getattr(transformers, auto).from_pretrained(second)
    assert type(again) is MODELS[f"dha_{model_type}"][auto]
    torch.testing.assert_close(again(ids).to_tuple()[0], expected)
    again.save_pretrained(third)
    files = {path.name for path in first.glob("*.py")}
    assert "modeling_dha.py" in files and "build.py" not in files
    for folder in (second, third):
        assert {path.name for path in folder.glob("*.py")} == files
        saved, original = (json.loads((path / "config.json").read_text()) for path in (folder, first))
        assert saved["auto_map"] == original["auto_map"] and len(saved["auto_map"]) == 6


def test_trunk_of_a_causal_checkpoint_loads_as_remote_code(make_pair, prompts, tmp_path):
    _, merged = make_pair("mistral")
    merged.save_pretrained(tmp_path / "model")
    torch.save(prompts[0], tmp_path / "model" / "ids.pt")
    got = load_without_package(tmp_path / "model", "AutoModel", tmp_path / "trunk", tmp_path / "cache")
    torch.testing.assert_close(got, merged.model(prompts[0]).last_hidden_state)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "trunk")(prompts[0]).last_hidden_state, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_loading_restores_maps_and_config(dtype, make_pair, prompts, tmp_path):
    _, merged = make_pair()
    merged = merged.to(dtype)
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", low_cpu_mem_usage=True)
    assert loaded.dtype == dtype
    for name, buffer in merged.named_buffers():
        assert "dha_maps" not in name or torch.equal(loaded.get_buffer(name), buffer), name
    if dtype == torch.float32:  # `.to(bfloat16)` rounds the rotary frequencies of any model, loading does not
        assert torch.equal(loaded(prompts[0]).logits, merged(prompts[0]).logits)
    before, after = merged.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: after[key] for key in before if key.startswith(("num_", "dha", "key_", "value_"))} == {
        key: before[key] for key in before if key.startswith(("num_", "dha", "key_", "value_"))
    }
    assert after["model_type"] == "dha_llama"


def test_equal_counts_are_also_in_the_standard_field(make_pair, tmp_path):
    from dha_peft.plan import DHAPlan, LayerPlan, contiguous_groups

    layers = [LayerPlan(contiguous_groups(8, n), contiguous_groups(8, n)) for n in (4, 2)]
    _, merged = make_pair(plan=DHAPlan(tuple(layers), 8))
    merged.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [4, 2]
    assert [layer.self_attn.num_key_value_groups for layer in merged.model.layers] == [2, 4]


def test_shipped_files_import_nothing_but_torch_transformers_and_each_other():
    folder = Path(dha_peft.models.__file__).parent
    shipped = [
        path
        for path in folder.glob("*.py")
        if path.name not in ("__init__.py", "build.py", "filling.py", "register.py")
    ]
    for path in shipped:
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("from ..", "import dha_peft", "from dha_peft")), (path.name, line)
