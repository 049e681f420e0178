"""Pretrains the small multi-head-attention language model that ships in ``examples/demo_model``.

Two stages, so that the accelerator is not kept waiting for text processing:

    prepare   text files -> tokenizer, token arrays, text samples   (CPU, minutes)
    train     token arrays -> weights, config, model card           (CUDA or CPU)

    python examples/pretrain_demo_model.py prepare --train books_*.jsonl.xz --heldout other_books.jsonl.xz --prepared work
    python examples/pretrain_demo_model.py train --prepared work --steps 9000 --compile

Text files hold one JSON object with the key ``text`` a line, plain or compressed with xz or gzip.
"""

import argparse
import gzip
import json
import lzma
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOCUMENT, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1; DOCUMENT goes before each text and is bos and eos
OPENERS = {".xz": lzma.open, ".gz": gzip.open}

CARD = """---
language: en
pipeline_tag: text-generation
---
# Demo model: a small multi-head-attention language model

A Llama model with {parameters:,} parameters ({layers} layers, {heads} query heads and as many key/value heads of
{head_dim}, hidden {hidden}, vocabulary {vocab}, tied embeddings, context {context}, bfloat16). It exists so that the
examples and tests of this project have a real pretrained model with multi-head attention to fuse, offline. It writes
plausible English sentences and knows nothing; it is of no use for anything else.

| | |
| --- | --- |
| training data | {description}: {train_documents} texts, {train_tokens:,} tokens of its own byte-level BPE tokenizer |
| training | {steps:,} steps of {batch} x {context} tokens = {seen:,} tokens seen ({epochs:.1f} epochs), {seconds:.0f} s on {device} |
| optimizer | AdamW, peak learning rate {lr}, {warmup} steps of warmup, cosine to zero, weight decay 0.1, seed {seed} |
| training loss | {train_loss:.4f} nats/token (mean of the last {log_every} steps) |
| held-out loss | **{heldout:.4f}** nats/token on {heldout_count:,} tokens of {heldout_documents} texts it never saw = {bits:.3f} bits/byte |
| loss on `text/validation.jsonl.xz` | **{sample:.4f}** nats/token on {sample_count:,} tokens |

Losses are of the saved bfloat16 weights, over windows of {context} predicted tokens one after the other, each text
preceded by token 0 (`{document}`). Nothing was filtered from the texts: their language and views are those of their time.

`text/calibration.jsonl.xz` holds passages of the training texts ({calibration_tokens:,} tokens), for calibration and
short training runs; `text/validation.jsonl.xz` holds passages of the held-out texts. Made by
`examples/pretrain_demo_model.py`. The weights are under the licence of this project.
"""


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The ``text`` of every line of the given jsonl files, in order."""
    texts = []
    for path in paths:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


def write_texts(path: Path, texts: list[str]) -> None:
    """Writes one ``{"text": ...}`` a line, compressed with xz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


def passages(texts: list[str], characters: int, avoid: list[str]) -> list[str]:
    """One passage of whole paragraphs from the middle of each text, about ``characters`` in all.

    The middle is past title pages and forewords. Passages that hold a word of ``avoid`` (in any case) are left out.
    """
    size, found = characters // len(texts), []
    for text in texts:
        start = text.find("\n\n", len(text) // 2)
        passage = text[max(start, 0) : max(start, 0) + size]
        passage = passage[: passage.rfind("\n\n")].strip() if "\n\n" in passage.strip() else passage.strip()
        if passage and not any(word.lower() in passage.lower() for word in avoid):
            found.append(passage)
    return found


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` entries; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[DOCUMENT, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": DOCUMENT, "eos_token": DOCUMENT, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **names)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves under the class name that transformers 4 and 5 both know; 5 would write a name that 4 does not."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids ``[tokens]`` (uint16) of all texts, each preceded by token 0."""
    parts = []
    for text in texts:  # one at a time: the encodings of a whole corpus need gigabytes
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        parts += [np.zeros(1, np.uint16), np.asarray(ids, np.uint16)]
    return np.concatenate(parts)


def prepare(options: argparse.Namespace) -> None:
    """Writes tokenizer and text samples to ``--out``, token arrays and counts to ``--prepared``."""
    texts = {"train": read_texts(options.train), "heldout": read_texts(options.heldout)}
    tokenizer = train_tokenizer(texts["train"][:: options.tokenizer_stride], options.vocabulary, options.context)
    save_tokenizer(tokenizer, options.out)
    texts["calibration"] = passages(texts["train"], options.calibration_characters, options.avoid)
    texts["sample"] = passages(texts["heldout"], options.validation_characters, options.avoid)
    for name, file in (("calibration", "calibration.jsonl.xz"), ("sample", "validation.jsonl.xz")):
        write_texts(options.out / "text" / file, texts[name])
    options.prepared.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int | str] = {"vocabulary": len(tokenizer), "description": options.description}
    for name, group in texts.items():
        tokens = encode(tokenizer, group)
        np.save(options.prepared / f"{name}.npy", tokens)
        counts |= {f"{name}_documents": len(group), f"{name}_tokens": len(tokens)}
        counts[f"{name}_bytes"] = sum(len(text.encode()) for text in group)
    (options.prepared / "counts.json").write_text(json.dumps(counts, indent=2))
    print(json.dumps(counts, indent=2))


def build_model(options: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """An untrained multi-head Llama (as many key/value heads as query heads) in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            head_dim=options.hidden // options.heads,
            max_position_embeddings=options.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def batches(tokens: torch.Tensor, batch: int, context: int) -> Iterator[torch.Tensor]:
    """Endless ``[batch, context + 1]`` windows; every epoch cuts the stream anew and shuffles the windows."""
    reach = torch.arange(context + 1, device=tokens.device)
    while True:
        phase = int(torch.randint(context, ()))
        starts = phase + context * torch.randperm((len(tokens) - phase - 1) // context)
        for part in starts.to(tokens.device).split(batch):
            if len(part) == batch:
                yield tokens[part[:, None] + reach].long()


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of ``hidden [B, T, D]`` under the head ``weight [V, D]``, ``targets [B, T]``."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


def window_loss(model: LlamaForCausalLM, windows: torch.Tensor, head=head_loss) -> torch.Tensor:
    """Mean next-token loss (nats) of ``windows [B, T + 1]`` under bfloat16 autocast."""
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        hidden = model.model(windows[:, :-1], use_cache=False).last_hidden_state
        return head(hidden, model.lm_head.weight, windows[:, 1:])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # another graph for a few evaluations is not worth compiling
def heldout_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int, limit: int | None = None) -> float:
    """Mean loss (nats/token) over consecutive windows that overlap by the one target token."""
    windows = tokens[: (len(tokens) - 1) // context * context + 1].unfold(0, context + 1, context)[:limit]
    losses = [window_loss(model, part.long()) * len(part) for part in windows.split(64)]
    return float(sum(losses)) / len(windows)


def learning_rate(step: int, elapsed: float, options: argparse.Namespace) -> float:
    """Warmup, then cosine to zero along steps or time, whichever is further, so that the decay always completes."""
    progress = max(step / options.steps, elapsed / options.max_seconds)
    return options.lr * min((step + 1) / options.warmup, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    weights = list(model.parameters())
    matrices, vectors = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def fit(model: LlamaForCausalLM, tokens: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, float]:
    """Trains in place until ``--steps`` or ``--max-seconds``; returns steps, seconds and the last training loss."""
    optimizer, head = make_optimizer(model), torch.compile(head_loss) if options.compile else head_loss
    if options.compile:
        for layer in model.model.layers:  # by layer: one graph serves all, and the causal mask stays implicit
            layer.compile()
    start, total, recent = time.perf_counter(), 0.0, math.nan
    for step, windows in enumerate(batches(tokens["train"], options.batch, options.context)):
        if step == 1:
            start = time.perf_counter()  # the first step compiles
        elapsed = time.perf_counter() - start if step else 0.0
        if step == options.steps or elapsed >= options.max_seconds:
            return {"steps": step, "seconds": elapsed, "train_loss": recent}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed, options)
        loss = window_loss(model, windows, head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = total + loss.detach()
        if (step + 1) % options.log_every == 0:
            recent, total = float(total) / options.log_every, 0.0
            report(model, tokens["heldout"], options, step + 1, recent, elapsed)
    raise RuntimeError("The stream of training batches ended, although it is endless.")


def report(model, heldout: torch.Tensor, options: argparse.Namespace, step: int, loss: float, elapsed: float) -> None:
    """Prints one line of progress, with a held-out loss every ``--eval-every`` steps."""
    done = step - 2  # the clock started after the first step and was read before the last
    rate = done * options.batch * options.context / max(elapsed, 1e-9) / 1e6
    line = f"step {step} loss {loss:.4f} {elapsed:.1f} s {rate:.3f} Mtoken/s"
    if step % options.eval_every == 0:
        line += f" held-out {heldout_loss(model, heldout, options.context, 400):.4f}"
    print(line, flush=True)


def write_card(model: LlamaForCausalLM, options: argparse.Namespace, counts: dict, figures: dict) -> None:
    """Writes the model card from what the run measured."""
    seen = figures["steps"] * options.batch * options.context
    sizes = {
        name: (counts[f"{name}_tokens"] - 1) // options.context * options.context for name in ("heldout", "sample")
    }
    facts = vars(options) | counts | figures
    facts |= {
        "parameters": model.num_parameters(),
        "head_dim": options.hidden // options.heads,
        "vocab": counts["vocabulary"],
        "seen": seen,
        "epochs": seen / counts["train_tokens"],
        "bits": figures["heldout"] * counts["heldout_tokens"] / counts["heldout_bytes"] / math.log(2),
        "heldout_count": sizes["heldout"],
        "sample_count": sizes["sample"],
        "document": DOCUMENT,
    }
    (options.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def train(options: argparse.Namespace) -> None:
    """Trains from ``--prepared`` and writes weights, config and card to ``--out``."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    counts = json.loads((options.prepared / "counts.json").read_text())
    arrays = {name: np.load(options.prepared / f"{name}.npy") for name in ("train", "heldout", "sample")}
    tokens = {name: torch.from_numpy(array.astype(np.int32)).to(device) for name, array in arrays.items()}
    model = build_model(options, counts["vocabulary"]).to(device)
    figures: dict = fit(model, tokens, options)
    model.to(torch.bfloat16).save_pretrained(options.out)
    saved = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device)
    figures |= {name: heldout_loss(saved, tokens[name], options.context) for name in ("heldout", "sample")}
    figures["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps(figures, indent=2))
    write_card(saved, options, counts, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    first = stages.add_parser("prepare", help="tokenizer, token arrays and text samples from text files")
    second = stages.add_parser("train", help="weights, config and model card from token arrays")
    first.set_defaults(run=prepare)
    second.set_defaults(run=train)
    for stage in (first, second):
        stage.add_argument("--prepared", type=Path, required=True, help="folder of the token arrays")
        stage.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
        stage.add_argument("--context", type=int, default=512, help="tokens of context")
    first.add_argument("--train", type=Path, nargs="+", required=True, help="jsonl[.xz|.gz] files to train on")
    first.add_argument("--heldout", type=Path, nargs="+", required=True, help="jsonl[.xz|.gz] files never trained on")
    first.add_argument("--vocabulary", type=int, default=4096)
    first.add_argument("--tokenizer-stride", type=int, default=4, help="every n-th text trains the tokenizer")
    first.add_argument("--calibration-characters", type=int, default=1_650_000)
    first.add_argument("--validation-characters", type=int, default=300_000)
    first.add_argument("--avoid", nargs="*", default=[], help="leave passages with these words out of the samples")
    first.add_argument("--description", default="text files", help="what the texts are, for the model card")
    for name, value in (("layers", 6), ("heads", 8), ("hidden", 256), ("intermediate", 576), ("steps", 9000)):
        second.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("batch", 128), ("warmup", 300), ("seed", 0), ("log-every", 100), ("eval-every", 1000)):
        second.add_argument(f"--{name}", type=int, default=value)
    second.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    second.add_argument("--max-seconds", type=float, default=math.inf, help="end earlier, decay completed")
    second.add_argument("--device", help="default: cuda if there is one, else cpu")
    second.add_argument("--compile", action="store_true", help="torch.compile the layers and the head")
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse()
    parsed.run(parsed)
