"""Uploads to a stand-in of the hub: which files arrive, and which card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .hub_stand_in import running

EXAMPLE = Path(__file__).parents[2] / "examples" / "push_to_hub.py"
CODE = {
    "modeling_dha.py", "configuration_dha.py", "attention.py", "cache_view.py", "core.py", "decode.py", "families.py", "family.py",
    "fused.py", "maps.py", "norms.py", "packing.py",
}  # fmt: skip


@pytest.fixture
def hub():
    with running() as server:
        yield server


def talk(hub, tmp_path, *arguments: str):
    """A process of its own, as huggingface_hub reads its endpoint when it is imported."""
    names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    names |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_the_example_pushes_model_and_tokenizer(hub, tmp_path):
    hub.repos["me/theirs"] = {"README.md": b"---\nlicense: mit\n---\n# My own words\n"}
    for repo in ("me/small", "me/theirs"):
        talk(hub, tmp_path, str(EXAMPLE), "--repo", repo, "--private", "--tokens", "2048")
    files = hub.repos["me/small"]
    wanted = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(files) == wanted | {"tokenizer_config.json"} | CODE
    assert b"dha_peft" not in b"".join(line for name in CODE for line in files[name].splitlines() if b"import" in line)
    (first, *_) = hub.created
    assert first["name"] == "small"
    assert first.get("visibility") == "private" or first["private"]  # newer clients, older clients
    assert "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]
    front = front_matter(files["README.md"])
    assert front["base_model"] == "demo_model" and {"dha", "peft"} <= set(front["tags"])
    assert b"6,144 -> 1,536 bytes per token" in files["README.md"]
    assert b"# My own words" in hub.repos["me/theirs"]["README.md"]


def test_an_upload_that_fails_is_one_sentence(result, dha, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", _refuse)
    status, _, err = dha("push", result, "me/small")
    assert status == 1 and "failed, and" in err and "no such token" in err and err.count("\n") == 1


def _refuse(*_arguments, **_options):
    raise RuntimeError("no such token")


def test_dha_push_uploads_the_whole_result(hub, result, tmp_path):
    out = talk(hub, tmp_path, "-m", "dha_peft.cli", "push", str(result), "me/whole", "--private")
    assert f"Uploaded to {hub.url}/me/whole" in out
    files = hub.repos["me/whole"]
    wanted = {"README.md", "model.safetensors", "tokenizer.json", "report.html", "results.json", "run.yaml", *CODE}
    assert wanted <= set(files) and "figures/budgets.png" in files
    assert all(files[name] == (result / name).read_bytes() for name in files)
