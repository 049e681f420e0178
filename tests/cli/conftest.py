"""The embedded model and a command line that runs in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dha_peft.cli import main

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
CALIBRATION = DEMO / "text" / "calibration.jsonl.xz"
VALIDATION = DEMO / "text" / "validation.jsonl.xz"
LLAMA_7B = """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "dtype": "bfloat16"}"""


@pytest.fixture
def dha(capsys, monkeypatch):
    """Runs the command; returns (exit status, stdout, stderr)."""
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments):
        try:
            main([str(a) for a in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """A small conversion of the embedded model, made once."""
    folder = tmp_path_factory.mktemp("cli") / "result"
    try:
        main(
            [
                "convert",
                str(DEMO),
                "-o",
                str(folder),
                "--text",
                str(CALIBRATION),
                "--validation",
                str(VALIDATION),
                "--limit",
                "2",
            ]
        )
    except SystemExit as stop:
        assert not stop.code
    return folder


@pytest.fixture
def llama_7b(tmp_path):
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    (folder / "config.json").write_text(LLAMA_7B)
    return folder
