"""Converts a small model from start to end: calibration, search, closed form, fusion training, collapse.

python examples/demo.py                                  # the embedded model, offline, a few minutes on two cores
python examples/demo.py --model PATH_OR_ID --text FILE --validation FILE --out FOLDER
"""

import argparse
import copy
import shutil
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TrainingArguments, set_seed
from transformers.utils import logging

from dha_peft import DHACallback, DHAConfig, DHATrainer, analyse, convert, get_dha_model
from dha_peft.texts import evaluate_loss, text_tokens, token_batches

HERE = Path(__file__).parent / "demo_model"
PROMPT = "The old man looked at the sea, and"
MARK = ".dha_demo"  # says that the folder is the demo's own
OUTPUTS = ("model", "trainer", "heads_per_layer.png")


def main() -> None:
    options = parse()
    check_output(options.out)
    set_seed(0)
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    batches = token_batches(tokenizer, [options.text], tokens=options.tokens)
    validation = text_tokens(tokenizer, [options.validation], tokens=options.validation_tokens + 1)
    config = DHAConfig(head_budget=options.budget, task_type="CAUSAL_LM")

    print(f"Converting {options.model} to {options.budget:.0%} of its KV heads.")
    losses = {"base": evaluate_loss(base, validation)}
    analysis = analyse(base, batches)
    plan = analysis.plan(config.search_options())
    print(plan)
    losses["closed form, no training"] = evaluate_loss(convert(base, config, analysis=analysis), validation)

    adapted = fuse(copy.deepcopy(base), config, analysis, batches, options)
    losses["after fusion training"] = evaluate_loss(adapted, validation)
    merged = adapted.merge_and_unload().eval()
    losses["after the collapse"] = evaluate_loss(merged, validation)

    report(losses, base, merged, tokenizer)
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    draw(plan, options.out / "heads_per_layer.png")
    print(f"\nWrote {options.out / 'model'} and {options.out / 'heads_per_layer.png'}. Your own model:")
    print("  python examples/demo.py --model PATH_OR_ID --text your.txt --validation other.txt --out FOLDER")


def check_output(folder: Path) -> None:
    """Stop before any work if `folder` holds something that an earlier demo did not write; a demo's own output is replaced."""
    if folder.exists() and not folder.is_dir():
        sys.exit(f"`--out` is `{folder}`, which is a file; name a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        sys.exit(
            f"`--out` is `{folder}`, which is not empty and not an earlier demo's output; name a new or empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / MARK).touch()


def fuse(base, config: DHAConfig, analysis, batches: list, options: argparse.Namespace):
    """Train only the adapter, with the base as teacher, while the Lagrangian ties the groups."""
    adapted = get_dha_model(base, config, analysis=analysis)
    rows = [{"input_ids": row} for batch in batches for row in batch["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = DHATrainer(model=adapted, args=arguments, train_dataset=rows, callbacks=[DHACallback()])
    trainer.train()
    return adapted.eval()


def report(losses: dict[str, float], base, merged, tokenizer) -> None:
    print("\nloss on held-out text (nats/token)")
    for name, loss in losses.items():
        print(f"  {name:26s} {loss:.4f}")
    before, after = (cache_bytes_per_token(model) for model in (base, merged))
    print(f"KV cache, measured: {before:,} -> {after:,} bytes per token ({after / before:.1%})")
    for name, model in (("base", base), ("converted", merged)):
        print(f"\n{name}: {sample(model, tokenizer)}")


def cache_bytes_per_token(model) -> int:
    """Bytes of the cache's own tensors after a forward pass, per token."""
    tokens, cache = torch.arange(16)[None].to(model.device), DynamicCache()
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) // tokens.numel()


def sample(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def draw(plan, path: Path) -> None:
    """Key heads and value heads kept in every layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    places = torch.arange(len(plan.layers))
    axes.bar(places - 0.2, [layer.num_key_heads for layer in plan.layers], 0.4, label="key heads")
    axes.bar(places + 0.2, [layer.num_value_heads for layer in plan.layers], 0.4, label="value heads")
    axes.axhline(plan.layers[0].num_heads, color="grey", linestyle=":", label="base")
    axes.set(xlabel="layer", ylabel="heads kept", xticks=places.tolist())
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE), help="local folder or hub id of an MHA or GQA model")
    parser.add_argument("--text", type=Path, default=HERE / "text" / "calibration.jsonl.xz")
    parser.add_argument("--validation", type=Path, default=HERE / "text" / "validation.jsonl.xz")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--budget", type=float, default=0.25, help="share of KV heads to keep")
    parser.add_argument("--tokens", type=int, default=262_144, help="calibration and training tokens")
    parser.add_argument("--validation-tokens", type=int, default=20_480)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    main()
