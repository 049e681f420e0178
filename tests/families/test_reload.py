"""Every family's merged checkpoint in another process, as remote code and without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dha_peft import DHAConfig, convert

from .cases import CASES, make_base, make_batches, prompts

# `sys.modules["dha_peft"] = None` makes every import of the package fail.
WITHOUT_PACKAGE = """
import sys
sys.modules["dha_peft"] = None
import json, torch, transformers
for folder, attn in json.load(open(sys.argv[1])):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=attn)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    torch.save((logits, tokens), folder + "/outputs.pt")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all merged models, with the outputs that the other process got."""
    root = tmp_path_factory.mktemp("merged")
    made, jobs = {}, []
    for case in CASES:
        folder = made[str(case)] = root / str(case)
        merged = convert(make_base(case, case.attn[-1]), DHAConfig(head_budget=0.5), make_batches(1))
        merged.save_pretrained(folder)
        torch.save(prompts(), folder / "inputs.pt")
        with torch.no_grad():
            tokens = merged.generate(**prompts(), max_new_tokens=4, do_sample=False)
            torch.save((merged(**prompts()).logits, tokens), folder / "expected.pt")
        jobs.append((str(folder), case.attn[-1]))
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(root / "jobs.json")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reload_in_another_process_without_the_package(case, folders):
    folder = folders[str(case)]
    logits, tokens = torch.load(folder / "outputs.pt")
    expected_logits, expected_tokens = torch.load(folder / "expected.pt")
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, expected_tokens)
