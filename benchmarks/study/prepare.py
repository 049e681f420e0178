"""What every job needs, computed once and shared with the workers through one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import Analysis
from dha_peft.attention import find_attention
from dha_peft.search import Statistics, collect_statistics, search_groups
from dha_peft.texts import text_tokens

from .recovery import Study

GROUPINGS = ("aligned", "contiguous", "cka")


def load_base(model: str, device: str) -> nn.Module:
    """The frozen base in fp32."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return base.to(device).eval().requires_grad_(False)


def prepare(args: argparse.Namespace, path: Path, train_tokens: int) -> None:
    """Tokenize the texts, analyse the base under every grouping, and save both to `path`."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = text_tokens(tokenizer, args.text, max(train_tokens, args.calibration_tokens))
    validation = text_tokens(tokenizer, [args.validation], args.windows * args.length + 1)
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    base = load_base(args.model, args.device)
    calibration = rows[: args.calibration_tokens // args.length].split(8)
    sites = find_attention(base)
    statistics = collect_statistics(base, sites, [{"input_ids": batch} for batch in calibration])
    curves = {grouping: search_groups(sites, statistics, grouping).curves for grouping in GROUPINGS}
    partial = path.with_suffix(".partial")
    torch.save({"rows": rows, "validation": validation, "statistics": vars(statistics), "curves": curves}, partial)
    partial.replace(path)


def load(path: Path, model: str, device: str, **fields: Any) -> Study:
    """The shared file as one worker's `Study` on its device. The file holds our own classes, so load only files that you made."""
    saved = torch.load(path, map_location="cpu", weights_only=False)
    base = load_base(model, device)
    sites, raw = find_attention(base), saved["statistics"]
    moved = {
        "moments": [moment.to(device) for moment in raw["moments"]],
        "metrics": [{kind: metric.to(device) for kind, metric in layer.items()} for layer in raw["metrics"]],
    }
    statistics = Statistics(**{**raw, **moved})
    analyses = {name: Analysis(sites, statistics, curves, grouping=name) for name, curves in saved["curves"].items()}
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, validation = saved["rows"].to(device), saved["validation"].to(device)
    return Study(base, tokenizer, analyses, rows, validation, **fields)
