"""What `import dha_peft` costs: it makes no class of any family and imports nothing heavy; every door makes them when asked."""

import subprocess
import sys
import textwrap

import pytest

HEAVY = ("datasets", "pandas", "triton", "lm_eval", "trl", "matplotlib", "sklearn", "dha_peft.cli", "dha_peft.report")


def run_fresh(code: str) -> str:
    """Standard output of `code` in an interpreter of its own."""
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_import_makes_no_family_and_loads_nothing_heavy():
    code = """
        import sys, peft, transformers
        before = set(sys.modules)
        import dha_peft
        print(*sorted(set(sys.modules) - before))
        print("made:", *dha_peft.models.CONFIGS, *dha_peft.models.MODELS)
    """
    modules, made = run_fresh(code).splitlines()
    assert made == "made:"
    new = modules.split()
    assert "dha_peft.models.modeling_dha" in new
    assert not [name for name in new if name.startswith("transformers.models.")]
    assert not [name for name in new if name.startswith(HEAVY)]


DOORS = {
    "llama: the table of models": "kind = MODELS['dha_llama']['AutoModelForCausalLM']",
    "qwen2: AutoConfig": "kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model('dha_qwen2'))]",
    "mistral: by name": "from dha_peft import DhaMistralForCausalLM as kind",
    "olmo: pickle": "kind = pickle.loads(b'cdha_peft.models.modeling_dha\\nDhaOlmoForCausalLM\\n.')",
    "gemma: the config by name": "from dha_peft import DhaGemmaConfig; kind = AutoModelForCausalLM._model_mapping[DhaGemmaConfig]",
    "phi: transformers' table": "kind = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING['dha_phi']().__class__]",
}


def test_every_door_leads_to_the_same_classes():
    """Each family is first asked for in another way; afterwards all ways agree, and pickles go both ways."""
    check = """
        config = AutoConfig.for_model(kind.config_class.model_type, num_hidden_layers=1, hidden_size=16,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, vocab_size=32, pad_token_id=0)
        assert type(config) is kind.config_class is CONFIG_MAPPING[config.model_type]
        assert type(AutoModelForCausalLM.from_config(config)) is kind is MODELS[config.model_type]["AutoModelForCausalLM"]
        assert getattr(dha_peft, kind.__name__) is kind and pickle.loads(pickle.dumps(kind)) is kind
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    """
    start = """
        import pickle, dha_peft
        from dha_peft.models import MODELS
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
        stand_in = CONFIG_MAPPING["dha_starcoder2"]
        assert pickle.loads(pickle.dumps(CONFIG_MAPPING))["dha_starcoder2"] is dha_peft.DhaStarcoder2Config
        assert isinstance(AutoConfig.for_model("dha_starcoder2"), stand_in) and issubclass(dha_peft.DhaStarcoder2Config, stand_in)
    """
    run_fresh("\n".join([textwrap.dedent(start), *(f"{door}\n{textwrap.dedent(check)}" for door in DOORS.values())]))


def test_unknown_names_are_attribute_errors():
    import dha_peft

    with pytest.raises(AttributeError, match="DhaNothingConfig"):
        _ = dha_peft.DhaNothingConfig
    with pytest.raises(KeyError, match="dha_nothing"):
        _ = dha_peft.models.MODELS["dha_nothing"]
    assert {"DhaLlamaForCausalLM", "DhaTrainer"} & set(dir(dha_peft)) == {"DhaLlamaForCausalLM"}
