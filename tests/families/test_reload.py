"""Merged checkpoints of all families in other processes: as remote code without the package, and with the package alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dha_peft import DHAConfig, convert

from . import test_encoder_decoders as seq2seq
from . import test_encoders as encoders
from .cases import CASES, make_base, make_batches, prompts

GREEDY = {"max_new_tokens": 4, "do_sample": False}
# `sys.modules["dha_peft"] = None` makes every import of the package fail.
WITHOUT_PACKAGE = 'sys.modules["dha_peft"] = None; start, trust = "transformers_modules.", {"trust_remote_code": True}'
WITH_PACKAGE = 'import dha_peft; start, trust = "dha_peft.models.", {}'
SCRIPT = """
import json, sys, torch, transformers
{prelude}
for folder, auto, attn in json.load(open(sys.argv[1])):
    model = getattr(transformers, auto).from_pretrained(folder, attn_implementation=attn, **trust)
    assert type(model).__module__.startswith(start), type(model).__module__
    inputs, options = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        outputs = [model(**inputs).to_tuple()[0]]
        if options is not None:
            outputs.append(model.generate(**options))
    torch.save(outputs, folder + "/" + sys.argv[2])
"""
ROADS = {"without": WITHOUT_PACKAGE, "with": WITH_PACKAGE}
HALF = DHAConfig(head_budget=0.5)


def models():
    """Name, Auto class, attention, merged model, inputs and arguments of `generate` of every row."""
    for case in CASES:
        merged = convert(make_base(case, case.attn[-1]), HALF, make_batches(1))
        yield str(case), "AutoModelForCausalLM", case.attn[-1], merged, prompts(), {**prompts(), **GREEDY}
    for family, auto in seq2seq.AUTOS.items():
        merged = convert(seq2seq.make_base(family, "sdpa"), HALF, [seq2seq.make_batch(family)])
        options = {**seq2seq.make_inputs(family), **seq2seq.GREEDY}
        yield family, auto, "sdpa", merged, seq2seq.make_batch(family), options
    for family, autos in encoders.ENCODERS.items():
        for auto in autos:
            merged = convert(encoders.make_encoder(family, auto, "sdpa"), HALF, encoders.calibration(family, 1))
            yield f"{family}-{auto}", auto, "sdpa", merged, encoders.make_inputs(family), None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all merged models, with the outputs that the other processes got."""
    root = tmp_path_factory.mktemp("merged")
    made, jobs = {}, []
    for name, auto, attn, merged, inputs, options in models():
        folder = made[name] = root / name
        merged.save_pretrained(folder)
        with torch.no_grad():
            expected = [merged(**inputs).to_tuple()[0], *([merged.generate(**options)] if options else [])]
        torch.save((inputs, options), folder / "inputs.pt")
        torch.save(expected, folder / "expected.pt")
        jobs.append((str(folder), auto, attn))
    (root / "jobs.json").write_text(json.dumps(jobs))
    package = Path(sys.modules["dha_peft"].__file__).parents[1]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    running = [_start(root, name, prelude, environment) for name, prelude in ROADS.items()]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return made


def _start(root: Path, name: str, prelude: str, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.replace("{prelude}", prelude), str(root / "jobs.json"), f"{name}.pt"]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


NAMES = [
    *map(str, CASES),
    *seq2seq.AUTOS,
    *(f"{family}-{auto}" for family, autos in encoders.ENCODERS.items() for auto in autos),
]


@pytest.mark.parametrize("name", NAMES)
def test_reload_in_another_process(name: str, folders: dict[str, Path]):
    expected = torch.load(folders[name] / "expected.pt")
    for road in ROADS:
        outputs = torch.load(folders[name] / f"{road}.pt")
        torch.testing.assert_close(outputs[0], expected[0], atol=1e-5, rtol=1e-5)
        assert len(outputs) == len(expected) and all(map(torch.equal, outputs[1:], expected[1:])), road
