"""What the heads of a base look like: similarity of heads, redundancy by layer, loss against the share of heads fused, budgets.

    python -m benchmarks.study.heads --model FOLDER --text TRAIN... --validation FILE

Writes `similarity.csv`, `redundancy.csv`, `fused.csv` and `budgets.csv` under `--results`; needs no training.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from dha_peft import Analysis, DHAConfig, convert
from dha_peft.attention import AttentionSite, find_attention
from dha_peft.fusion.heads import AttentionWeights
from dha_peft.fusion.moments import head_gram
from dha_peft.fusion.problem import HeadProblem
from dha_peft.fusion.similarity import aligned_similarity, cka_similarity, cosine_similarity
from dha_peft.plan import DHAPlan
from dha_peft.search import Statistics, collect_statistics, search_groups
from dha_peft.texts import evaluate_loss, text_tokens, token_batches

from .methods import METHODS
from .prepare import load_base
from .tables import add_data, devices

HEADS = ("query", "key", "value")
FUSED_METHODS = ("gqa", "unaligned", "uniform", "aligned")
BUDGETS = ("uniform", "undamped", "aligned")


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = load_base(args.model, args.device)
    batches = token_batches(tokenizer, args.text, args.calibration_tokens, args.length)
    validation = text_tokens(tokenizer, [args.validation], args.windows * args.length + 1)
    sites = find_attention(base)
    statistics = collect_statistics(base, sites, batches)
    analyses = {name: search_groups(sites, statistics, name) for name in ("aligned", "contiguous")}
    layers = args.layers or [0, len(sites) // 2]
    write(args.results / "similarity.csv", similarity(sites, statistics, layers))
    write(args.results / "redundancy.csv", redundancy(sites, statistics))
    write(args.results / "budgets.csv", budgets(analyses, args.budget))
    write(args.results / "fused.csv", fused(base, analyses, validation, args.kept, args.length))


def similarity(sites: list[AttentionSite], statistics: Statistics, layers: list[int]) -> Iterator[dict[str, Any]]:
    """Every pair of key heads and of value heads of some layers, raw (absolute cosine) and aligned."""
    for layer in layers:
        for kind in ("key", "value"):
            for measure, matrix in measures(sites[layer], statistics, kind).items():
                for (i, j), value in _pairs(matrix):
                    yield {"layer": layer, "kind": kind, "measure": measure, "i": i, "j": j, "similarity": value}


def redundancy(sites: list[AttentionSite], statistics: Statistics) -> Iterator[dict[str, Any]]:
    """Mean over each head of how like it the most similar other head of its layer is."""
    for site in sites:
        for kind in HEADS:
            for measure, matrix in measures(site, statistics, kind).items():
                nearest = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), -1.0).amax(1)
                yield {
                    "layer": site.index,
                    "kind": kind,
                    "measure": measure,
                    "nearest": round(float(nearest.mean()), 4),
                }


def measures(site: AttentionSite, statistics: Statistics, kind: str) -> dict[str, Tensor]:
    """Measure -> `[H, H]` on the CPU."""
    moment, weights = statistics.moments[site.index].double(), site.weights(torch.float64)
    heads = getattr(weights, kind).to(moment.device)
    metric = query_metric_of_keys(weights, moment) if kind == "query" else statistics.metrics[site.index][kind].double()
    layout = site.layout("value" if kind == "value" else "key").to(moment.device)
    found = {
        "raw": cosine_similarity(heads).abs(),
        "CKA": cka_similarity(head_gram(heads, moment)),
        "aligned": aligned_similarity(HeadProblem.from_heads(heads, moment, metric, layout)),
    }
    return {name: matrix.cpu() for name, matrix in found.items()}


def query_metric_of_keys(weights: AttentionWeights, moment: Tensor) -> Tensor:
    """Metric of errors of query heads: the energy of the keys that each meets, `[Hq, d, d]`."""
    keys = weights.key.to(moment.device)
    return (keys @ moment @ keys.transpose(1, 2)).repeat_interleave(weights.queries_per_head, 0)


def fused(
    base: nn.Module, analyses: dict[str, Analysis], validation: Tensor, kept: list[float], length: int
) -> Iterator[dict[str, Any]]:
    """Loss without any training, against the share of KV heads kept."""
    yield {"method": "base", "kept": 1.0, "loss": round(evaluate_loss(base, validation, length), 4)}
    for name in FUSED_METHODS:
        for share in kept:
            config = DHAConfig(head_budget=share, **METHODS[name].fields)
            model = convert(base, config, analysis=analyses[METHODS[name].grouping])
            yield {"method": name, "kept": share, "loss": round(evaluate_loss(model, validation, length), 4)}


def budgets(analyses: dict[str, Analysis], budget: float) -> Iterator[dict[str, Any]]:
    """Key heads and value heads of every layer under equal budgets, those by sensitivity alone and the default."""
    for name in BUDGETS:
        config = DHAConfig(head_budget=budget, **METHODS[name].fields)
        plan: DHAPlan = analyses["aligned"].plan(config.search_options())
        for index, layer in enumerate(plan.layers):
            counts = {"keys": layer.num_key_heads, "values": layer.num_value_heads}
            yield {"rule": name, "budget": budget, "layer": index, "heads": layer.num_heads} | counts


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Rows to a CSV file, and a line that says so."""
    found = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"{path}: {len(found)} rows", flush=True)


def _pairs(matrix: Tensor) -> Iterator[tuple[tuple[int, int], float]]:
    count = len(matrix)
    return (((i, j), round(float(matrix[i, j]), 4)) for i in range(count) for j in range(count))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--layers", type=int, nargs="+", help="layers of the similarity (default: first and middle)")
    parser.add_argument("--budget", type=float, default=0.25, help="of the budgets by layer")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.1875, 0.125])
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"))
    parser.add_argument("--device", default=devices()[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
